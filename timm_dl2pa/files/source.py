"""Where config and weights are: in a folder, or in a repository of the Hugging Face Hub, which is downloaded."""
import os
import re
from pathlib import Path
from typing import Any

from .folder import CONFIG_NAME, WEIGHTS_NAME

__all__ = ['check_token', 'find_files']

_PICKLE_SUFFIXES = ('.bin', '.pt', '.pth', '.ckpt', '.pkl', '.tar')


def find_files(
        source: str | os.PathLike[str],
        what: str,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        **options: Any,
) -> tuple[Path, str]:
    """Find the folder that holds config and weights. A Hub repository is downloaded to the cache, both files of one
    commit.

    Args:
        source: A folder or a Hub repository ('user/name'; also 'hf-hub:user/name@revision' and 'local-dir:folder').
        what: The expected content for error messages, such as 'a DL2PA head'.
        revision: The branch, tag or commit of the repository.
        token: The token for huggingface_hub.
        options: Further options of `hf_hub_download`.

    Returns:
        The folder, and the name of the source for error messages.

    Raises:
        FileNotFoundError: The folder does not exist, or it lacks one of the files.
        ValueError: The repository lacks one of the files, or has its weights only as a pickle; or the token is none.
        huggingface_hub.errors.LocalEntryNotFoundError: The Hub cannot be reached, and the cache has no copy.
        huggingface_hub.errors.HfHubHTTPError: Any other error of huggingface_hub.
    """
    check_token(token)
    text = os.fspath(source)
    repository = text.removeprefix('hf-hub:')
    local = text.removeprefix('local-dir:')
    if local != text or (repository == text and Path(text).is_dir()):
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if not (Path(local) / name).is_file():
                _refuse_pickle([path.name for path in Path(local).glob('*')], name, local)
                raise FileNotFoundError(f'{local} has no {name}: it does not hold {what}.')
        return Path(local), local
    repository, _, named_revision = repository.partition('@')
    if not re.fullmatch(r'[\w.-]+(/[\w.-]+)?', repository):
        raise FileNotFoundError(f'{text} is neither a folder nor the name of a repository on the Hub (user/name).')
    from huggingface_hub import HfApi, constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    revision = revision or named_revision or None
    try:
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            path = hf_hub_download(repository, name, revision=revision, token=token, library_name='timm_dl2pa',
                                   **options)
            # Of the commit that the first file came from, whatever is pushed meanwhile.
            revision = Path(path).parent.name
    except LocalEntryNotFoundError as error:
        cause = error.__cause__
        reason = 'local_files_only=True' if options.get('local_files_only') else \
            'HF_HUB_OFFLINE is set' if constants.HF_HUB_OFFLINE else \
            f'the request to the Hub failed ({type(cause).__name__}: {cause})' if cause else \
            'the request to the Hub failed'
        raise LocalEntryNotFoundError(f'The cache has no {name} of {repository}, and {reason}: download it once with '
                                      f'a connection.') from error
    except EntryNotFoundError:
        _refuse_pickle(HfApi(token=token).list_repo_files(repository, revision=revision), name, repository)
        raise ValueError(f'{repository} has no {name}: it does not hold {what}.') from None
    return Path(path).parent, repository


def check_token(token: str | bool | None) -> None:
    """Check that a token can be sent in a header. The HTTP client's error for one that cannot shows the token.

    Args:
        token: The token for huggingface_hub.

    Raises:
        ValueError: It is no string, or has characters that no token has, such as the end of the line that it was read
            from. It is not shown.
    """
    if token is not None and not isinstance(token, (str, bool)):
        raise ValueError(f'token must be a string, True, False or None, not of the type {type(token).__name__}.')
    if isinstance(token, str) and not re.fullmatch('[!-~]+', token):
        raise ValueError('token is empty, or has spaces, line breaks or characters that no token has: strip what was '
                         'read from a file (token.strip()).')


def _refuse_pickle(names: list[str], missing: str, origin: str) -> None:
    """Raise a ValueError if the missing file is the weights, and there are weights in a pickle."""
    pickles = [name for name in names if name.endswith(_PICKLE_SUFFIXES)]
    if missing == WEIGHTS_NAME and pickles:
        raise ValueError(f'{origin} has its weights only as a pickle ({pickles[0]}), which could run any code and is '
                         f'not loaded. Ask its owner for {WEIGHTS_NAME}.')
