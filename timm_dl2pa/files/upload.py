"""One commit with all files to a repository of the Hugging Face Hub, or none."""
from collections.abc import Mapping
from pathlib import Path

from ..version import __version__
from .card import CARD_NAME, PICTURE_NAME

__all__ = ['upload']


def upload(
        contents: Mapping[str, bytes | Path],
        repo_id: str,
        *,
        commit_message: str,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
) -> str:
    """Send files in one commit, the card only where there is none, and return the commit's address."""
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError
    api = HfApi(token=token, library_name='timm_dl2pa', library_version=__version__)
    is_new = not api.repo_exists(repo_id)
    if is_new:
        try:
            repo_id = api.create_repo(repo_id, private=private).repo_id
        except HfHubHTTPError as error:
            if error.response.status_code != 409:
                raise
            is_new = False  # it exists, but cannot be seen, or its name has no owner
            repo_id = api.create_repo(repo_id, exist_ok=True).repo_id
    try:
        if not is_new and api.file_exists(repo_id, CARD_NAME, revision=revision):
            contents = {name: content for name, content in contents.items() if name not in (CARD_NAME, PICTURE_NAME)}
        operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
        commit = api.create_commit(
            repo_id, operations, commit_message=commit_message, revision=revision, create_pr=create_pr)
    except Exception as error:
        if not is_new:
            raise
        raise RuntimeError(f'the repository {repo_id} was made, but the upload failed, so that it is empty: upload '
                           f'again, or delete it on the Hub. ({type(error).__name__}: {error})') from error
    return commit.pr_url or commit.commit_url
