"""Masks in files of NumPy and MATLAB: the array is read, and nothing in the file is run."""

import re
from collections.abc import Mapping
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cps_ray.datasets.raster import UnreadableError

_NAME_IT = "name the matrix as MATLAB shows it, such as `mask_variable: groundTruth[0].Segmentation`"


def read_numpy(data: bytes) -> NDArray[Any]:
    """Reads the array in a .npy file; unlike `np.load`, it takes neither archives nor pickles. Raises UnreadableError."""
    try:
        version = np.lib.format.read_magic(stream := BytesIO(data))
        shape, _, dtype = (
            np.lib.format.read_array_header_1_0(stream)
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0(stream)
        )
        # Before the array is made: a header can promise any size.
        if int(np.prod(shape, dtype=object)) * dtype.itemsize != len(data) - stream.tell():
            raise UnreadableError(f"the file says {shape} of {dtype}, which is not what it holds", "get the file again")
        return np.asarray(np.lib.format.read_array(BytesIO(data), allow_pickle=False))
    except UnreadableError:
        raise
    except Exception as error:  # damaged headers are parsed as Python: SyntaxError, tokenize's errors and others
        found = f"the file cannot be read as .npy ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
        raise UnreadableError(found, "save it again with `numpy.save`, as whole numbers") from None


def read_matlab(data: bytes, variable: str | None) -> NDArray[Any]:
    """Reads the label map in a .mat file: `variable`, else SBD's `GTcls.Segmentation`, else its only matrix. Raises UnreadableError."""
    from scipy.io import loadmat  # takes half a second to import

    try:
        content = loadmat(BytesIO(data))
    except NotImplementedError:
        raise UnreadableError("the file is MATLAB 7.3", "save it again with `save(..., '-v7')`") from None
    except Exception as error:  # SciPy's reader trips over damaged bytes in any way, UnboundLocalError among them
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise UnreadableError(f"the file cannot be read as .mat ({reason})", "get the file again") from None
    if variable is not None:
        return _matlab_variable(content, variable)
    if "GTcls" in content:
        return _matlab_variable(content, "GTcls.Segmentation")
    arrays = {
        name: value
        for name, value in content.items()
        if not name.startswith("__")
        and isinstance(value, np.ndarray)
        and value.dtype.kind in "iufb"
        and value.ndim == 2
    }
    if len(arrays) != 1:
        found = f"a .mat mask must hold `GTcls` as SBD does, or one matrix, but holds {_matlab_names(content)}"
        raise UnreadableError(found, "say in the recipe which is the mask, `mask_variable: NAME`")
    return np.asarray(next(iter(arrays.values())))


def _matlab_variable(content: Mapping[str, Any], variable: str) -> NDArray[Any]:
    """Returns what `groundTruth.Segmentation` names; a struct or cell of one entry is looked through."""
    value: Any = content
    done = ""
    for name, place in re.findall(r"([^.\[\]]+)(?:\[(\d+)\])?", variable):
        fields = value.keys() if isinstance(value, Mapping) else getattr(value.dtype, "names", None) or ()
        if name not in fields:
            has = _matlab_names(dict.fromkeys(fields)) if fields else "no fields"
            raise UnreadableError(
                f"`mask_variable: {variable}` must be in the file, but {done or 'it'} has {has}", _NAME_IT
            )
        value, done = value[name], f"{done}.{name}" if done else name
        value, done = _matlab_entry(value, place, done, variable)
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "iufb":
        raise UnreadableError(f"`mask_variable: {variable}` must be a matrix of numbers, but is none", _NAME_IT)
    return value


def _matlab_entry(value: Any, place: str, done: str, variable: str) -> tuple[Any, str]:
    """Looks through cells and structs: returns the entry at `place`, or the only one."""
    while isinstance(value, np.ndarray) and (value.dtype == object or value.dtype.names):
        entries = value.ravel()
        if not place and entries.size != 1:
            found = f"`mask_variable: {variable}` must name one matrix, but {done} has {entries.size} entries"
            raise UnreadableError(found, f"say which, counted from 0: `{done}[0]`")
        if place and int(place) >= entries.size:
            raise UnreadableError(f"{done}[{place}] must exist, but {done} has {entries.size} entries", _NAME_IT)
        value, done, place = entries[int(place or 0)], f"{done}[{place}]" if place else done, ""
        if isinstance(value, np.void):  # one struct, whose fields come next
            break
    return value, done


def _matlab_names(content: Mapping[str, object]) -> str:
    return ", ".join(name for name in content if not name.startswith("__")) or "nothing"
