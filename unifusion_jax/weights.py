"""Published weights in and out: a table of names per architecture, read from or written to safetensors folders.

A table is a list of `Rule`s in one canonical spelling of the checkpoint's names. Other spellings are mapped onto it by a
`rename` function. `{layer}` in a rule's source gathers the tensors of all layers into one parameter with a leading layer
axis, which is how `unifusion_jax.layers.Stack` stores repeated blocks.
"""

import collections
import dataclasses
import functools
import json
import mmap
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import safetensors
import safetensors.flax
from flax import traverse_util

from unifusion_jax import placement

Params = dict[str, Any]
Rename = Callable[[str], str | None]

BUNDLED = "bundled:"
_ASSETS = Path(__file__).parent / "assets"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")  # configuration, weights, tokenizer
_DTYPES: dict[str, Any] = {
    **{"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16},
    **{"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "BOOL": np.bool_},
    **{"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8},
    **{"U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8},
}


@dataclasses.dataclass(frozen=True)
class Transform:
    """A change of layout between a checkpoint tensor and our parameter, with its inverse (None: only ever loaded).

    A `forward` made of transposes, slices and reshapes that split axes is a view: only the slices that devices need are then
    read. One that has to copy (a reshape that joins axes after a cut, arithmetic) reads its whole tensor.
    """

    forward: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[np.ndarray], np.ndarray] | None


def _permute(*order: int) -> Transform:
    inverse = tuple(int(i) for i in np.argsort(order))
    return Transform(lambda x: x.transpose(order), lambda x: x.transpose(inverse))


IDENTITY = Transform(lambda x: x, lambda x: x)
LINEAR = _permute(1, 0)  # torch (out, in) -> (in, out)
CONV = _permute(2, 3, 1, 0)  # torch (out, in, kh, kw) -> (kh, kw, in, out)
CONV3D = _permute(2, 3, 4, 1, 0)  # torch (out, in, kt, kh, kw) -> (kt, kh, kw, in, out)


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a weight table: checkpoint tensor `source` becomes parameter `target` (dotted path) by `transform`."""

    source: str
    target: str
    transform: Transform = IDENTITY

    @property
    def pattern(self) -> re.Pattern[str]:
        """The regular expression that `source` stands for."""
        return re.compile(re.escape(self.source).replace(r"\{layer\}", r"(?P<layer>\d+)"))


def resolve(path: str | os.PathLike[str], *, subfolder: str | None = None) -> Path:
    """Returns a local folder for `path`: a folder, a hub id such as "OpenGVLab/InternVL3-1B-hf", or "bundled:demo/encoder".

    Of a hub repository only configuration, tokenizer and safetensors files are fetched, and none of its subfolders.

    Args:
      path: as above.
      subfolder: what to take of a pipeline, e.g. "vae": a folder or repository that has no config.json but one in there. Of
        such a repository only that part is fetched.

    Raises:
      FileNotFoundError: when there is neither a folder nor a repository.
    """
    folder = Path(path).expanduser()
    if str(path).startswith(BUNDLED):
        folder = _ASSETS / str(path).removeprefix(BUNDLED)
        if not folder.is_dir():
            names = sorted(f"{BUNDLED}{entry.relative_to(_ASSETS)}" for entry in _ASSETS.glob("*/*/"))
            raise FileNotFoundError(f"{str(path)!r} does not come with the package; bundled are {names}.")
    if folder.is_dir():
        return folder / subfolder if subfolder and _is_pipeline(folder, subfolder) else folder
    if folder.exists() or not _HUB_ID.fullmatch(str(path)):
        raise FileNotFoundError(
            f"No folder {str(path)!r}. Expected a folder with config.json and *.safetensors, or a hub id like 'owner/name'."
        )
    return _fetch(str(path), subfolder)


def _is_pipeline(folder: Path, subfolder: str) -> bool:
    return not (folder / "config.json").exists() and (folder / subfolder / "config.json").exists()


def _fetch(repository: str, subfolder: str | None) -> Path:
    import huggingface_hub

    download = functools.partial(huggingface_hub.snapshot_download, repository)
    try:
        if subfolder is not None:
            folder = Path(download(allow_patterns=["config.json", f"{subfolder}/config.json"]))
            if _is_pipeline(folder, subfolder):
                return Path(download(allow_patterns=[f"{subfolder}/{name}" for name in _HUB_FILES])) / subfolder
        return Path(download(allow_patterns=list(_HUB_FILES), ignore_patterns=["*/*"]))
    except (huggingface_hub.errors.HfHubHTTPError, huggingface_hub.errors.LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"{repository!r} is neither a local folder nor a hub repository that could be fetched ({type(error).__name__}: "
            f"{error}). Check the spelling and the network, or download it and pass the folder."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; raises FileNotFoundError or ValueError naming the file."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist. A checkpoint folder needs it; got {_listing(path.parent)}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}. Fetch or write the file again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}.")
    return content


def _listing(folder: Path) -> str:
    if not folder.is_dir():
        return "no such folder"
    return ", ".join(sorted(entry.name for entry in folder.iterdir())[:12]) or "an empty folder"


class SafetensorsFolder:
    """The tensors of a folder's *.safetensors files (one file, or shards with an index), mapped and read when looked at.

    Raises:
      FileNotFoundError: no such files, or fewer than the index lists.
      ValueError: a truncated file, a broken index, or one tensor in two files.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._file_of: dict[str, _File] = {}
        for path in self._paths():
            file = _File(path)
            for name in file.entries:
                if name in self._file_of:
                    raise ValueError(
                        f"{folder}: tensor {name!r} is in both {self._file_of[name].path.name} and {path.name}. Keep one of "
                        "them, or add the index that says which holds what."
                    )
                self._file_of[name] = file

    def _paths(self) -> list[Path]:
        # Files of a variant (model.fp16.safetensors) count only where there is nothing else.
        indexes = sorted(
            self.folder.glob("*.safetensors.index.json"), key=lambda path: (path.name.count("."), path.name)
        )
        if indexes:
            index = read_json(indexes[0]).get("weight_map")
            if not isinstance(index, dict) or not index:
                raise ValueError(f"{indexes[0]} has no 'weight_map' of tensor names and files. Fetch it again.")
            names = sorted(set(index.values()))
            missing = [name for name in names if not (self.folder / name).exists()]
            if missing:
                raise FileNotFoundError(
                    f"{indexes[0].name} lists files that {self.folder} lacks: {missing}. Fetch them."
                )
            return [self.folder / name for name in names]
        files = sorted(self.folder.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(
                f"No *.safetensors file in {self.folder} (got {_listing(self.folder)}). Pickled weights are never loaded: "
                "convert them to safetensors first."
            )
        return [path for path in files if "." not in path.stem] or files

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._file_of)

    def read(self, name: str) -> np.ndarray:
        """Returns one tensor as a read-only view of its mapped file (bfloat16 as ml_dtypes.bfloat16)."""
        return self._file_of[name].view(name)


class _File:
    """One mapped safetensors file: 8 bytes header length, a JSON header of types, shapes and offsets, then the data."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with safetensors.safe_open(path, framework="numpy"):  # checks the header and that the data is all there
                pass
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} is not a complete safetensors file ({error}); it is probably truncated or still being "
                "downloaded. Fetch it again."
            ) from error
        with path.open("rb") as file:
            self._bytes = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        self._start = 8 + int(self._bytes[:8].view("<u8")[0])
        header = json.loads(self._bytes[8 : self._start].tobytes())
        self.entries: dict[str, Any] = {name: entry for name, entry in header.items() if name != "__metadata__"}

    def view(self, name: str) -> np.ndarray:
        entry = self.entries[name]
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"type: {name} is stored as {entry['dtype']}; known are {', '.join(_DTYPES)}")
        start, end = (self._start + offset for offset in entry["data_offsets"])
        return self._bytes[start:end].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])


def load(
    abstract: Params,
    source: SafetensorsFolder | Mapping[str, np.ndarray],
    rules: Sequence[Rule],
    *,
    rename: Rename | None = None,
    dtype: Any = None,
    shardings: Params | None = None,
    finish: Callable[[str, jax.Array], Any] | None = None,
) -> Params:
    """Fills a parameter tree from named tensors.

    Each host reads only the slices that its devices hold, and holds no more than two parameters' slices beside the devices'
    own copies.

    Args:
      abstract: pure dict of arrays or `jax.ShapeDtypeStruct`, the tree to fill.
      source: where the tensors are.
      rules: the weight table.
      rename: maps any spelling of a name to the table's, or to None to leave the tensor out.
      dtype: type to store; the abstract leaf's own when None.
      shardings: tree like `abstract` of `jax.sharding.Sharding`; the default device when None.
      finish: gets each parameter's dotted path and array as soon as it is loaded, and returns what to keep in its place
        (for example a quantised one), so that the tree is never whole in the loaded type.

    Raises:
      ValueError: with all missing, unexpected and misshapen tensors listed together, before any is read.
    """
    wanted: dict[str, Any] = dict(traverse_util.flatten_dict(abstract, sep="."))
    placed: dict[str, Any] = dict(traverse_util.flatten_dict(shardings, sep=".")) if shardings else {}
    names = source.names() if isinstance(source, SafetensorsFolder) else source
    read = source.read if isinstance(source, SafetensorsFolder) else lambda name: np.asarray(source[name])
    parts, problems = _assign(names, rules, rename, set(wanted))
    problems += [f"missing: {target}" for target in sorted(wanted) if target not in parts]
    problems += _check(wanted, parts, read)
    if problems:
        where = source.folder if isinstance(source, SafetensorsFolder) else "the given tensors"
        shown = "\n  ".join(problems[:40] + ([f"and {len(problems) - 40} more"] if len(problems) > 40 else []))
        raise ValueError(
            f"{len(problems)} weights of {where} do not fit this architecture. Is config.json the one the weights were saved "
            f"with?\n  {shown}"
        )
    filled: dict[str, Any] = {}
    previous = None
    with placement.copy_threads() as threads:
        for target, pieces in parts.items():
            leaf = wanted[target]
            ready = [placement.Piece(layer, _reader(read, name, how)) for layer, name, how in pieces]
            value = placement.assemble(leaf.shape, dtype or leaf.dtype, ready, placed.get(target), threads)
            filled[target] = value if finish is None else finish(target, value)
            del value
            jax.block_until_ready(previous)  # one transfer overlaps the next copy; more would pile up on the host
            previous = filled[target]
    return traverse_util.unflatten_dict(filled, sep=".")


def _reader(read: Callable[[str], np.ndarray], name: str, transform: Transform) -> Callable[[], np.ndarray]:
    return lambda: transform.forward(read(name))


_Piece = tuple[int | None, str, Transform]


def _assign(
    names: Iterable[str], rules: Sequence[Rule], rename: Rename | None, wanted: set[str]
) -> tuple[dict[str, list[_Piece]], list[str]]:
    """Matches names to rules: parameter path -> [(layer or None, tensor name, transform)], and the unexpected names."""
    exact = collections.defaultdict(list)
    patterns = []
    for rule in rules:
        if "{layer}" in rule.source:
            patterns.append((rule.pattern, rule))
        else:
            exact[rule.source].append(rule)
    parts: dict[str, list[_Piece]] = collections.defaultdict(list)
    problems = []
    for name in names:
        canonical = rename(name) if rename else name
        if canonical is None:
            continue
        matches: list[tuple[Rule, int | None]] = [(rule, None) for rule in exact.get(canonical, ())]
        for pattern, rule in patterns:
            if found := pattern.fullmatch(canonical):
                matches.append((rule, int(found["layer"])))
        matches = [(rule, layer) for rule, layer in matches if rule.target in wanted]
        if not matches:
            problems.append(f"unexpected: {name}")
        for rule, layer in matches:
            parts[rule.target].append((layer, name, rule.transform))
    return dict(parts), problems


def _check(
    wanted: Mapping[str, Any], parts: Mapping[str, list[_Piece]], read: Callable[[str], np.ndarray]
) -> list[str]:
    """Lists the parameters whose tensors do not cover them, without reading any."""
    known: dict[tuple[Any, ...], tuple[int, ...]] = {}

    def shape_of(name: str, transform: Transform) -> tuple[int, ...]:
        key = (transform, read(name).shape)
        if key not in known:
            known[key] = transform.forward(np.broadcast_to(np.int8(0), key[1])).shape
        return known[key]

    problems = []
    for target, pieces in parts.items():
        expected = tuple(wanted[target].shape)
        stacked = pieces[0][0] is not None
        given = collections.Counter(layer for layer, _, _ in pieces)
        if any(count > 1 for count in given.values()):
            problems.append(f"ambiguous: {target} is given by {[name for _, name, _ in pieces]}")
            continue
        if stacked and (absent := sorted(set(range(expected[0])) - set(given))):
            problems.append(f"missing: {target} for layers {absent}")
        for layer, name, transform in pieces:
            if layer is not None and layer >= expected[0]:
                problems.append(f"unexpected: {name} (the config has {expected[0]} layers)")
                continue
            try:
                got = shape_of(name, transform)
            except ValueError as error:
                problems.append(f"shape: {name} -> {target}: got {read(name).shape}, {error}")
                continue
            if got != expected[stacked:]:
                problems.append(f"shape: {name} -> {target}: got {got}, the config expects {expected[stacked:]}")
    return problems


def to_tensors(params: Params, rules: Sequence[Rule], *, dtype: Any = None) -> dict[str, np.ndarray]:
    """Applies a weight table backwards: parameter tree -> named tensors in the table's spelling.

    Rules whose target the tree lacks are left out, so one table serves every optional part. Raises ValueError when a
    parameter has no rule.
    """
    flat = traverse_util.flatten_dict(params, sep=".")
    tensors: dict[str, np.ndarray] = {}
    written = set()
    for rule in rules:
        inverse = rule.transform.inverse
        if rule.target not in flat or inverse is None:
            continue
        written.add(rule.target)
        if not hasattr(flat[rule.target], "dtype"):
            raise ValueError(
                f"{rule.target} is quantised ({type(flat[rule.target]).__name__}): what was rounded away cannot be written. "
                "Load the weights without quantize."
            )
        value = np.asarray(flat[rule.target])
        value = value if dtype is None else value.astype(dtype)
        if "{layer}" in rule.source:
            for layer, piece in enumerate(value):
                tensors[rule.source.format(layer=layer)] = np.ascontiguousarray(inverse(piece))
        else:
            tensors[rule.source] = np.ascontiguousarray(inverse(value))
    unwritten = sorted(set(flat) - written)
    if unwritten:
        raise ValueError(f"The weight table has no name for these parameters: {unwritten}.")
    return tensors


def save(tensors: Mapping[str, np.ndarray], file: Path, *, metadata: dict[str, str] | None = None) -> None:
    """Writes tensors to one safetensors file, first under a temporary name so that a crash leaves no half file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    safetensors.flax.save_file(
        {name: jax.numpy.asarray(value) for name, value in tensors.items()},
        temporary,
        metadata=metadata or {"format": "pt"},
    )
    temporary.replace(file)
