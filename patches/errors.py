"""Every error that thinkkv raises on purpose: what was wrong, then what to do, on one line."""


class ThinkKVError(Exception):
    """Base of all expected failures; its message is written for the user."""


class UnsupportedModelError(ThinkKVError):
    """The model's architecture has no patch, or does not look like the registered one."""


class BudgetError(ThinkKVError):
    """The cache budget cannot be met; the message names the smallest that can."""


class ProfileMismatchError(ThinkKVError):
    """A head profile is damaged or was calibrated on another model."""


class UnsupportedGenerationError(ThinkKVError):
    """A way of generating that a heterogeneous cache cannot serve."""


class PatchStateError(ThinkKVError):
    """The model is patched already, or a handle is used after its revert."""


class ModelNotFoundError(ThinkKVError):
    """No model at this alias, hub id, folder or file."""


class MissingExtraError(ThinkKVError):
    """An optional part of thinkkv is not installed; the message names the extra."""


class AdapterMismatchError(ThinkKVError):
    """An adapter was trained on another model, or cannot be merged."""


class ExportError(ThinkKVError):
    """A model cannot be written in the format that was asked for."""


class BundleError(ThinkKVError):
    """An exported folder is damaged, incomplete, foreign or newer than this thinkkv."""


class SavedCacheError(ThinkKVError):
    """A cache cannot be saved, or a saved one is damaged, foreign or newer than this thinkkv."""


class RecipeError(ThinkKVError):
    """A training recipe says something that cannot be; the message names the line."""
