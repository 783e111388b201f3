"""For --device-modules: every process of the training kills itself after KILL_AFTER batches."""
import os
import signal

from timm_dl2pa.timm_scripts.task import DL2PATask

update_ema = DL2PATask.update_ema
left = int(os.environ['KILL_AFTER'])


def update_and_die(self, step=None):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    update_ema(self, step)


DL2PATask.update_ema = update_and_die
