"""An exported folder to the Hugging Face Hub: checked first, then one commit, or nothing."""

from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id

from .model_card import REPO_PLACEHOLDER
from .verify import verify_in_clean_process

# The HTTP library's own base class of errors (httpx or httpx2, by huggingface_hub's version).
HTTP_ERROR = HfHubHTTPError.__bases__[0]
COMMIT_MESSAGE = "Upload Backdrop model"
# The Hub's own, never part of an export.
KEPT_ON_THE_HUB = ".gitattributes"


class PushError(RuntimeError):
    """A push that failed. One line: why, and whether anything was committed."""


def push(
    folder: str | Path,
    repo_id: str,
    private: bool = False,
    revision: str | None = None,
    endpoint: str | None = None,
    token: str | None = None,
) -> str:
    """Makes the repository's content equal the folder's, in a single commit.

    The folder is loaded in a clean process first; if that fails nothing is sent. Files of the repository that the
    folder does not hold are deleted by the same commit (the history keeps them).

    Args:
        folder: written by `export`.
        repo_id: "owner/name"; made if it is not there.
        private: make it private; an error if it is there already and public.
        revision: an existing branch; None: main.
        endpoint: another Hub than huggingface.co.
        token: None: the one that `hf auth login` stored.

    Returns:
        URL of the commit; of the last one if nothing has changed.

    Raises:
        ValueError: the folder does not load, or `repo_id` is no repository name.
        PushError: the Hub refused, or could not be reached.
    """
    folder = Path(folder)
    validate_repo_id(repo_id)
    verify_in_clean_process(folder)
    api = HfApi(endpoint=endpoint, token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
        head = api.model_info(repo_id, revision=revision)
    except Exception as error:
        raise PushError(f"{_reason(error, repo_id, api.endpoint)}; nothing was committed.") from error
    if private and not head.private:
        raise PushError(f"{repo_id} is public already, private was asked for; nothing was committed.")
    try:
        additions = list(_additions(folder, repo_id))
        api.preupload_lfs_files(repo_id, additions, revision=revision, free_memory=False)
    except Exception as error:
        raise PushError(f"{_reason(error, repo_id, api.endpoint)}; nothing was committed.") from error
    names = {addition.path_in_repo for addition in additions} | {KEPT_ON_THE_HUB}
    deletions = [
        CommitOperationDelete(file.rfilename) for file in head.siblings if file.rfilename not in names
    ]
    try:
        # Not `upload_folder`: with hf_xet installed it makes several commits.
        commit = api.create_commit(
            repo_id,
            [*deletions, *additions],
            commit_message=COMMIT_MESSAGE,
            revision=revision,
            parent_commit=head.sha,
        )
    except Exception as error:
        outcome = _outcome(error, api, repo_id, revision, head.sha)
        raise PushError(f"{_reason(error, repo_id, api.endpoint)}; {outcome}.") from error
    return commit.commit_url


def _additions(folder: Path, repo_id: str) -> Iterator[CommitOperationAdd]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if not path.is_file() or any(part.startswith(".") or part == "__pycache__" for part in name.parts):
            continue
        if name.as_posix() == "README.md":
            card = path.read_text(encoding="utf-8").replace(REPO_PLACEHOLDER, repo_id)
            yield CommitOperationAdd(name.as_posix(), card.encode())
        else:
            yield CommitOperationAdd(name.as_posix(), path)


def _reason(error: Exception, repo_id: str, endpoint: str) -> str:
    """One line for a failed request. The Hub's client may have wrapped the error that matters."""
    chain = list(_causes(error))
    answers = [cause for cause in chain if isinstance(cause, HfHubHTTPError)]
    if answers:
        return _reason_of_answer(answers[0], repo_id, endpoint)
    lost = [cause for cause in chain if isinstance(cause, HTTP_ERROR | ConnectionError | TimeoutError)]
    if lost:
        return f"Pushing to {repo_id}: the connection to {endpoint} failed ({_one_line(lost[0])})"
    return f"Pushing to {repo_id} failed: {_one_line(error)}"


def _reason_of_answer(error: HfHubHTTPError, repo_id: str, endpoint: str) -> str:
    status = error.response.status_code
    if isinstance(error, RevisionNotFoundError):
        return f"Pushing to {repo_id}: the revision is not there (404); wanted an existing branch"
    meanings = {
        401: "not logged in, or the token is not valid (401); run `hf auth login`, or pass a token that may write",
        403: "no permission to write there (403); the token needs write access to this repository",
        404: "the repository was not found (404)",
        409: "another change got in the way (conflict, 409); push again",
        412: "the repository changed meanwhile (conflict, 412); push again",
    }
    meaning = meanings.get(status, f"{endpoint} answered {status} ({error.server_message or 'no message'})")
    return f"Pushing to {repo_id}: {meaning}"


def _outcome(error: Exception, api: HfApi, repo_id: str, revision: str | None, parent: str) -> str:
    """Whether a commit request that failed was carried out all the same."""
    answers = [cause for cause in _causes(error) if isinstance(cause, HfHubHTTPError)]
    if answers and answers[0].response.status_code < 500:
        return "nothing was committed"
    try:
        head = api.model_info(repo_id, revision=revision).sha
    except Exception:
        return "whether the commit arrived is not known, pushing again is safe"
    if head == parent:
        return "nothing was committed"
    return f"the answer was lost, but the repository has a new commit, {head}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
