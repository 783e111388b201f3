"""`python -m timm_dl2pa` is the command `timm-dl2pa`."""
import sys

from .cli import main

sys.exit(main())
