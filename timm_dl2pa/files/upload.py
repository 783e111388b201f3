"""Upload files to a repository of the Hugging Face Hub in one commit."""
from collections.abc import Mapping
from pathlib import Path

from ..version import __version__
from .card import CARD_NAME, PICTURE_NAME
from .source import check_token

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
    """Upload files in one commit. The repository is created if necessary, and an existing card is kept.

    Args:
        contents: The contents, or the local files, by name in the repository.
        repo_id: The repository, 'user/name'.
        commit_message: The first line of the commit message.
        private: Whether a new repository is private. Default: the user's setting on the Hub.
        token: A token with write access. Default: the stored one.
        revision: The branch. Default: main.
        create_pr: Whether to open a pull request instead of committing to the branch.

    Returns:
        The URL of the commit, or of the pull request.

    Raises:
        ValueError: The token or the commit message is none, or a branch of a new repository is named. Nothing was sent.
        RuntimeError: The upload to a new repository failed. The repository exists and is empty.
        huggingface_hub.errors.HfHubHTTPError: Any other error of huggingface_hub. The repository is unchanged.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError
    check_token(token)
    if not isinstance(commit_message, str) or not commit_message.strip():
        raise ValueError(f'commit_message must be a line of text, not {commit_message!r}.')
    api = HfApi(token=token, library_name='timm_dl2pa', library_version=__version__)
    is_new = not api.repo_exists(repo_id)
    if is_new and revision not in (None, 'main'):
        raise ValueError(f'revision={revision!r} names a branch of {repo_id}, which does not exist or is not visible '
                         f'with this token: upload without revision first.')
    if is_new:
        try:
            repo_id = api.create_repo(repo_id, private=private).repo_id
        except HfHubHTTPError as error:
            if error.response.status_code != 409:
                raise
            is_new = False  # it exists but is not visible, or repo_id has no owner
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
        raise RuntimeError(f'the repository {repo_id} was created, but the upload failed, and it is empty: upload '
                           f'again, or delete it on the Hub. ({type(error).__name__}: {error})') from error
    return commit.pr_url or commit.commit_url
