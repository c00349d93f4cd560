"""The files of an export that is a folder: GPTQ's and EXL2's checkpoints.

The folder grows as `NAME.partial`, with its tensors' files as `*.partial` in it, and gets its name when all
of them are whole. So there is no moment at which a reader could open half of it, or a new shard beside an old
index.

    NAME.partial/model.safetensors.partial    grows, with a journal beside it
    NAME.partial/model.safetensors            whole
    NAME/                                     the folder renamed; one that was there is removed then
"""

import shutil
from pathlib import Path

from converters.disk import PARTIAL, explained, rename_all
from converters.donors import keys_path
from converters.journal import JournaledFile
from converters.plan import ConvertOptions, Plan

_REPLACED = ".replaced"


class ExportFolder:
    """The files of one plan under their temporary names, in the plan's order."""

    def __init__(self, plan: Plan, options: ConvertOptions) -> None:
        """Create every file in its full length, or go on with an interrupted run's; raises OutputError."""
        self.path = options.folder / plan.directory
        self._partial = options.folder / (plan.directory + PARTIAL)
        self.files: list[JournaledFile] = []
        with explained(self._partial):
            self._partial.mkdir(parents=True, exist_ok=True)
        try:
            for file in plan.files:
                path = self._partial / file.name
                self.files.append(JournaledFile(path, file.head, file.n_bytes, fresh=options.fresh))
        except BaseException:
            self.abort()
            raise

    def flush(self) -> None:
        """Wait until the disk has everything."""
        for file in self.files:
            file.flush()

    def commit(self) -> None:
        """Give the folder its name, and remove what had it; raises OutputError, and then it has none."""
        rename_all([file.file for file in self.files])
        for file in self.files:
            file.forget()
            # Another run would make a folder anew as a whole; and a folder is passed on as it is.
            keys_path(file.file.path).unlink(missing_ok=True)
        names = {file.file.path.name for file in self.files}
        replaced = self.path.with_name(self.path.name + _REPLACED)
        with explained(self.path):
            for path in [path for path in self._partial.iterdir() if path.name not in names]:
                path.unlink()
            shutil.rmtree(replaced, ignore_errors=True)
            if self.path.exists():
                self.path.replace(replaced)
            self._partial.replace(self.path)
            shutil.rmtree(replaced, ignore_errors=True)

    def abort(self) -> None:
        """Leave the temporary files for the next run, but for those without use to it."""
        for file in self.files:
            file.leave()
        self._remove_if_empty()

    def discard(self) -> None:
        """Remove the temporary files."""
        for file in self.files:
            file.discard()
        self._remove_if_empty()

    def _remove_if_empty(self) -> None:
        if self._partial.is_dir() and not any(self._partial.iterdir()):
            self._partial.rmdir()


def is_export(folder: Path) -> bool:
    """Return whether a path is a folder that a conversion may replace: a quantized checkpoint, or empty."""
    if not folder.is_dir():
        return False
    config = folder / "config.json"
    if config.is_file():
        return "quantization_config" in config.read_text("utf-8", "replace")
    return not any(folder.iterdir())
