"""Published weights in and out: a table of names per architecture, read from or written to safetensors folders.

A table is a list of `Rule`s in one canonical spelling of the checkpoint's names. Other spellings are mapped onto it by a
`rename` function. `{layer}` in a rule's source gathers the tensors of all layers into one parameter with a leading layer
axis, which is how `unifusion_jax.layers.Stack` stores repeated blocks.
"""

import collections
import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.flax
from flax import traverse_util

Params = dict[str, Any]
Rename = Callable[[str], str | None]

BUNDLED = "bundled:"
_ASSETS = Path(__file__).parent / "assets"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


@dataclasses.dataclass(frozen=True)
class Transform:
    """A change of layout between a checkpoint tensor and our parameter, with its inverse (None: only ever loaded)."""

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


def resolve(path: str | os.PathLike[str]) -> Path:
    """Returns a local folder for `path`: a folder, a hub id such as "OpenGVLab/InternVL3-1B-hf", or "bundled:demo/encoder".

    Of a hub repository only configuration, tokenizer and safetensors files are fetched. Raises FileNotFoundError when
    neither exists.
    """
    folder = Path(path).expanduser()
    if str(path).startswith(BUNDLED):
        folder = _ASSETS / str(path).removeprefix(BUNDLED)
        if not folder.is_dir():
            names = sorted(f"{BUNDLED}{entry.relative_to(_ASSETS)}" for entry in _ASSETS.glob("*/*/"))
            raise FileNotFoundError(f"{str(path)!r} does not come with the package; bundled are {names}.")
    if folder.is_dir():
        return folder
    if folder.exists() or not _HUB_ID.fullmatch(str(path)):
        raise FileNotFoundError(
            f"No folder {str(path)!r}. Expected a folder with config.json and *.safetensors, or a hub id like 'owner/name'."
        )
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(str(path), allow_patterns=_HUB_FILES))
    except (huggingface_hub.errors.HfHubHTTPError, huggingface_hub.errors.LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"{str(path)!r} is neither a local folder nor a hub repository that could be fetched ({type(error).__name__}: "
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
    """The tensors of a folder's *.safetensors files (one file, or shards with an index), read one at a time on demand."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.file_of: dict[str, Path] = {}
        for file in self._files():
            try:
                with safetensors.safe_open(file, framework="numpy") as reader:
                    self.file_of.update(dict.fromkeys(reader.keys(), file))
            except (safetensors.SafetensorError, OSError) as error:
                raise ValueError(
                    f"{file} is not a complete safetensors file ({error}); it is probably truncated or still being "
                    "downloaded. Fetch it again."
                ) from error

    def _files(self) -> list[Path]:
        indexes = sorted(self.folder.glob("*.safetensors.index.json"))
        if indexes:
            names = sorted(set(read_json(indexes[0])["weight_map"].values()))
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
        return files

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self.file_of)

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor (bfloat16 as ml_dtypes.bfloat16)."""
        with safetensors.safe_open(self.file_of[name], framework="flax") as reader:
            return np.asarray(reader.get_tensor(name))


def load(
    abstract: Params,
    source: SafetensorsFolder | Mapping[str, np.ndarray],
    rules: Sequence[Rule],
    *,
    rename: Rename | None = None,
    dtype: Any = None,
    shardings: Params | None = None,
) -> Params:
    """Fills a parameter tree from named tensors.

    Args:
      abstract: pure dict of arrays or `jax.ShapeDtypeStruct`, the tree to fill.
      source: where the tensors are.
      rules: the weight table.
      rename: maps any spelling of a name to the table's, or to None to leave the tensor out.
      dtype: type to store; the abstract leaf's own when None.
      shardings: tree like `abstract` of `jax.sharding.Sharding`; the default device when None.

    Raises:
      ValueError: with all missing, unexpected and misshapen tensors listed together.
    """
    wanted: dict[str, Any] = dict(traverse_util.flatten_dict(abstract, sep="."))
    placed: dict[str, Any] = dict(traverse_util.flatten_dict(shardings, sep=".")) if shardings else {}
    parts, problems = _assign(list(_names(source)), rules, rename, set(wanted))
    problems += [f"missing: {target}" for target in sorted(wanted) if target not in parts]
    read = source.read if isinstance(source, SafetensorsFolder) else source.__getitem__
    filled: dict[str, Any] = {}
    for target, pieces in parts.items():
        leaf = wanted[target]
        try:
            value = _assemble(target, leaf, pieces, read, np.dtype(dtype or leaf.dtype))
        except ValueError as error:
            problems.append(str(error))
            continue
        if not problems:
            filled[target] = jax.device_put(value, placed.get(target))
    if problems:
        where = source.folder if isinstance(source, SafetensorsFolder) else "the given tensors"
        shown = "\n  ".join(problems[:40] + ([f"and {len(problems) - 40} more"] if len(problems) > 40 else []))
        raise ValueError(
            f"{len(problems)} weights of {where} do not fit this architecture. Is config.json the one the weights were saved "
            f"with?\n  {shown}"
        )
    return traverse_util.unflatten_dict(filled, sep=".")


def _names(source: SafetensorsFolder | Mapping[str, np.ndarray]) -> Iterable[str]:
    return source.names() if isinstance(source, SafetensorsFolder) else source


_Piece = tuple[int | None, str, Transform]


def _assign(
    names: list[str], rules: Sequence[Rule], rename: Rename | None, wanted: set[str]
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


def _assemble(
    target: str, leaf: Any, pieces: list[_Piece], read: Callable[[str], np.ndarray], dtype: np.dtype
) -> np.ndarray:
    """Reads the tensors of one parameter, stacking layers straight into the array that is returned."""
    if pieces[0][0] is None:
        if len(pieces) > 1:
            raise ValueError(f"ambiguous: {target} is given by {[name for _, name, _ in pieces]}")
        value = pieces[0][2].forward(read(pieces[0][1]))
        _check_shape(target, pieces[0][1], value.shape, leaf.shape)
        return np.ascontiguousarray(value.astype(dtype))
    layers = {
        layer: (name, transform) for layer, name, transform in pieces if layer is not None and layer < leaf.shape[0]
    }
    absent = sorted(set(range(leaf.shape[0])) - set(layers))
    if absent:
        raise ValueError(f"missing: {target} for layers {absent}")
    stacked = np.empty(leaf.shape, dtype)
    for layer, (name, transform) in layers.items():
        value = transform.forward(read(name))
        _check_shape(target, name, value.shape, leaf.shape[1:])
        stacked[layer] = value
    return stacked


def _check_shape(target: str, name: str, got: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if tuple(got) != tuple(expected):
        raise ValueError(f"shape: {name} -> {target}: got {tuple(got)}, the config expects {tuple(expected)}")


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
