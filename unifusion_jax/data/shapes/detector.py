"""Reading a picture back into its scene, by analysis through synthesis.

Every occupied cell is compared with every object the renderer can draw (shape, size, texture, colour, small shifts,
sharp and blurred), and the best one is kept if it leaves little of the cell unexplained. What no object explains is
reported as unknown, never as the nearest guess, so that a broken picture cannot score by luck.
"""

import dataclasses
import functools

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from unifusion_jax.data.shapes.render import BACKGROUND_RGB, COLOUR_RGB, OBJECT_SIZE_PX, SECOND_TONE_RGB, object_masks
from unifusion_jax.data.shapes.scene import (
    COLOURS,
    GRID_CELLS,
    POSITIONS,
    REFERENCE_SIZE_PX,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    SceneObject,
)

MAX_RESIDUAL = 0.05
"""Share of an object's contrast energy that may stay unexplained before the cell counts as unknown."""

MAX_SHIFT_PX = 5
"""How far from the centre of its cell an object may be, along each axis, in a picture scaled to 96 px."""

_CELL_PX = REFERENCE_SIZE_PX // GRID_CELLS
_PAD_PX = MAX_SHIFT_PX
_BLUR_SIGMAS_PX = (0.0, 1.2)
_COARSE_SHIFTS = tuple((y, x) for y in range(-4, 5, 2) for x in range(-4, 5, 2))
_FINE_SHIFTS = tuple((y, x) for y in (-1, 0, 1) for x in (-1, 0, 1))
_BACKGROUND_RADIUS = 60.0  # RGB distance within which a pixel can be background; black and navy are 89 apart
_MAX_BACKGROUND_OFFSET = 42.0  # of the estimated background colour from the named one
_MIN_BACKGROUND_SHARE = 0.2  # nine large squares still leave this much free
_FOREGROUND_DISTANCE = 62.0  # RGB distance from the background from which a pixel is part of something
_MIN_FOREGROUND_PX = 24  # fewer such pixels in a cell are an artefact; the smallest object covers about 90
_TOLERANCE = 24.0  # RGB distance from the model that noise and shifts of colour may cause
_MAX_COLOUR_OFFSET = 60.0  # RGB distance of an object's mean colour in the picture from the one it is drawn in
_MIN_TEXTURE_CONTRAST = 0.35  # of the contrast of a texture's two tones, as a share of the drawn one
_MIN_CONFIDENCE = 0.005  # a smaller lead over the next best object is too close to call

_KINDS = tuple((shape, size, texture) for shape in SHAPES for size in SIZES for texture in TEXTURES)


@dataclasses.dataclass(frozen=True)
class _Match:
    """The best object for a cell: its lead over the next best one, its energy, and whether it really looks so."""

    item: SceneObject
    lead: float
    energy: float
    is_plausible: bool


@dataclasses.dataclass(frozen=True)
class Detection:
    """What was read from a picture.

    Attributes:
        scene: the recognised objects on the nearest named background; jitter is not reported.
        confidence: for each object, how much more of its cell it explains than the best object of another shape,
            colour, size or texture; 0 is a tie.
        residual: for each object, the share of its contrast energy left unexplained; 0 is a perfect copy.
        unknown: positions of cells that hold something which is no object of the vocabulary.
        background_known: whether the picture has a uniform background near one of the named colours.
    """

    scene: Scene
    confidence: tuple[float, ...]
    residual: tuple[float, ...]
    unknown: tuple[str, ...]
    background_known: bool

    @property
    def is_clean(self) -> bool:
        """Whether everything in the picture was recognised."""
        return self.background_known and not self.unknown


def detect(
    image: UInt8[np.ndarray, "height width 3"] | Float[np.ndarray, "height width 3"],
    *,
    max_residual: float = MAX_RESIDUAL,
) -> Detection:
    """Read a picture back into a scene.

    Args:
        image: uint8, or float in [-1, 1]; any size, also not square.
        max_residual: see `MAX_RESIDUAL`.

    Returns:
        The detection.

    Raises:
        ValueError: not a colour picture, or values that are not finite.
    """
    pixels = _canonical(image)
    background, background_rgb, share = _background(pixels)
    if share < _MIN_BACKGROUND_SHARE:
        return Detection(Scene((), background), (), (), POSITIONS, False)
    offset = float(np.linalg.norm(background_rgb - np.asarray(BACKGROUND_RGB[background])))
    padded = np.pad(pixels - background_rgb, ((_PAD_PX, _PAD_PX), (_PAD_PX, _PAD_PX), (0, 0)))
    matches: dict[int, _Match] = {}
    busy = set(range(len(POSITIONS)))
    # The fullest cell first; what it explains is taken away, so that an object reaching into a neighbour's cell is not
    # read twice.
    while busy:
        filled = {cell: _foreground_px(padded, cell) for cell in busy}
        cell = max(filled, key=filled.__getitem__)
        if filled[cell] < _MIN_FOREGROUND_PX:
            break
        busy.remove(cell)
        matches[cell] = _fit(padded, cell, background_rgb)
    objects, unknown, confidence, residual = [], [], [], []
    for cell, match in sorted(matches.items()):
        excess = np.maximum(_distances(padded, cell) - _TOLERANCE, 0.0)
        unexplained = float(np.square(excess).sum()) / match.energy
        if unexplained > max_residual or not match.is_plausible:
            unknown.append(POSITIONS[cell])
        else:
            objects.append(match.item)
            confidence.append(match.lead)
            residual.append(unexplained)
    scene = Scene(tuple(objects), background)
    return Detection(scene, tuple(confidence), tuple(residual), tuple(unknown), offset <= _MAX_BACKGROUND_OFFSET)


def _canonical(image: np.ndarray) -> np.ndarray:
    """Any picture as float32 [96, 96, 3] in 0 to 255: the nine cells, cut square and scaled to 32 px."""
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] != 3 or min(image.shape[:2]) < GRID_CELLS:
        raise ValueError(f"expected a colour picture [height, width, 3], got an array of shape {image.shape}")
    if image.dtype != np.uint8:
        if not np.isfinite(image).all():
            raise ValueError("the picture holds values that are not finite; expected floats in [-1, 1]")
        image = np.rint((np.clip(image.astype(np.float32), -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8)
    height, width = image.shape[:2]
    if (height, width) == (REFERENCE_SIZE_PX, REFERENCE_SIZE_PX):
        return image.astype(np.float32)
    picture = Image.fromarray(image)
    side = min(height, width) / GRID_CELLS
    canvas = np.empty((REFERENCE_SIZE_PX, REFERENCE_SIZE_PX, 3), np.float32)
    for cell in range(len(POSITIONS)):
        row, column = divmod(cell, GRID_CELLS)
        x, y = (column + 0.5) * width / GRID_CELLS, (row + 0.5) * height / GRID_CELLS
        box = (x - side / 2, y - side / 2, x + side / 2, y + side / 2)
        box = (max(box[0], 0.0), max(box[1], 0.0), min(box[2], float(width)), min(box[3], float(height)))
        patch = picture.resize((_CELL_PX, _CELL_PX), Image.Resampling.BICUBIC, box=box)
        rows, columns = slice(row * _CELL_PX, (row + 1) * _CELL_PX), slice(column * _CELL_PX, (column + 1) * _CELL_PX)
        canvas[rows, columns] = np.asarray(patch, np.float32)
    return canvas


def _background(pixels: np.ndarray) -> tuple[str, np.ndarray, float]:
    """(name, colour in the picture, share of all pixels) of the background: the named colour of most pixels."""
    flat = pixels.reshape(-1, 3)
    names = tuple(BACKGROUND_RGB)
    palette = np.asarray([BACKGROUND_RGB[name] for name in names], np.float32)
    distances = np.stack([np.square(flat - colour).sum(1) for colour in palette], 1)
    near = (distances <= _BACKGROUND_RADIUS**2) & (distances == distances.min(1, keepdims=True))
    best = int(near.sum(0).argmax())
    share = float(near[:, best].mean())
    colour = np.median(flat[near[:, best]], axis=0) if share else palette[best]
    return names[best], colour, share


def _window(padded: np.ndarray, cell: int, down: int, right: int) -> np.ndarray:
    """View of the cell-sized window around a shifted cell centre, [32, 32, 3]."""
    row, column = divmod(cell, GRID_CELLS)
    top, left = _PAD_PX + row * _CELL_PX + down, _PAD_PX + column * _CELL_PX + right
    return padded[top : top + _CELL_PX, left : left + _CELL_PX]


def _distances(padded: np.ndarray, cell: int) -> np.ndarray:
    """Length of what is left of each pixel of a cell after a 3x3 mean, which takes out the noise of single pixels."""
    mean = sum(_window(padded, cell, down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)) / 9.0
    return np.sqrt(np.square(mean).sum(2))


def _foreground_px(padded: np.ndarray, cell: int) -> int:
    """How many pixels of a cell differ clearly from the background."""
    return int((_distances(padded, cell) >= _FOREGROUND_DISTANCE).sum())


@functools.lru_cache(maxsize=1)
def _masks() -> tuple[np.ndarray, np.ndarray]:
    """All templates: masks [blurs, kinds, 2 tones, 32 * 32] and their inner products [blurs, kinds, 2, 2]."""
    masks = np.zeros((len(_BLUR_SIGMAS_PX), len(_KINDS), 2, _CELL_PX, _CELL_PX), np.float32)
    for k, (shape, size, texture) in enumerate(_KINDS):
        tones = object_masks(shape, texture, OBJECT_SIZE_PX[size])
        inset = (_CELL_PX - tones[0].shape[0]) // 2
        area = slice(inset, _CELL_PX - inset)
        for b, sigma in enumerate(_BLUR_SIGMAS_PX):
            masks[b, k, :, area, area] = tones
            if sigma:
                smooth = _blur_matrix(sigma)
                masks[b, k] = smooth @ masks[b, k] @ smooth.T
    masks = masks.reshape(*masks.shape[:3], -1)
    return masks, np.einsum("bkip,bkjp->bkij", masks, masks)


def _blur_matrix(sigma_px: float) -> np.ndarray:
    """Gaussian blur along one side of a cell as a matrix [32, 32]."""
    at = np.arange(_CELL_PX, dtype=np.float32)
    kernel = np.exp(-np.square((at[:, None] - at[None]) / sigma_px) / 2)
    return kernel / kernel.sum(1).max()


def _gains(padded: np.ndarray, cell: int, shifts: list, blurs: slice, tones: np.ndarray) -> np.ndarray:
    """Energy that each template takes away from a cell when subtracted, [shifts, blurs, kinds, colours].

    |d|^2 - |d - m|^2 = 2 d.m - m.m, where a template m is the sum over both tones of mask times colour contrast `tones`
    [colours, 2, 3]; so one product of all masks with all shifted windows serves all colours.
    """
    masks, overlaps = (part[blurs] for part in _masks())
    windows = np.stack([_window(padded, cell, *shift).reshape(-1, 3) for shift in shifts])
    # One product a shift: small enough for BLAS to stay on one thread, which is faster wherever cores are busy.
    products = (masks.reshape(-1, _CELL_PX**2) @ windows).reshape(len(shifts), -1, 6)
    flat_tones = tones.reshape(len(tones), 6)
    projected = products @ flat_tones.T
    contrasts = np.einsum("cix,cjx->ijc", tones, tones).reshape(4, -1)
    energies = overlaps.reshape(-1, 4) @ contrasts
    return (2 * projected - energies).reshape(len(shifts), *masks.shape[:2], len(tones))


def _fit(padded: np.ndarray, cell: int, background_rgb: np.ndarray) -> _Match:
    """The object that explains most of a cell; `padded` loses what it explains."""
    palette = [(COLOUR_RGB[name], SECOND_TONE_RGB[name]) for name in COLOURS]
    tones = np.asarray(palette, np.float32) - background_rgb
    coarse = _gains(padded, cell, list(_COARSE_SHIFTS), slice(-1, None), tones)
    down, right = _COARSE_SHIFTS[int(coarse.max((1, 2, 3)).argmax())]
    shifts = [(down + y, right + x) for y, x in _FINE_SHIFTS]
    gains = _gains(padded, cell, shifts, slice(None), tones)
    at, blur, kind, colour = np.unravel_index(int(gains.argmax()), gains.shape)
    shape, size, texture = _KINDS[kind]
    item = SceneObject(shape, COLOURS[colour], size, texture, POSITIONS[cell])
    runner_up, best = np.partition(gains.max((0, 1)).ravel(), -2)[-2:]
    masks, overlaps = (part[blur, kind] for part in _masks())
    window = _window(padded, cell, *shifts[at])
    is_plausible = _has_colours(masks @ window.reshape(-1, 3), overlaps, tones[colour], textured=texture != "solid")
    model = (masks.T @ tones[colour]).reshape(window.shape)
    window -= model
    energy = float(np.square(model).sum())
    lead = float(best - runner_up) / energy
    return _Match(item, lead, energy, is_plausible and lead >= _MIN_CONFIDENCE)


def _has_colours(products: np.ndarray, overlaps: np.ndarray, tones: np.ndarray, *, textured: bool) -> bool:
    """Whether an object has its colour, and the contrast of its texture, rather than merely the nearest ones.

    Args:
        products: of both tones' masks with the picture, [2, 3].
        overlaps: of the masks with each other, [2, 2].
        tones: contrasts of the named tones, [2, 3].
        textured: whether there is a second tone.
    """
    if not textured:
        return bool(np.linalg.norm(products[0] / overlaps[0, 0] - tones[0]) <= _MAX_COLOUR_OFFSET)
    fitted = np.linalg.solve(overlaps, products)  # least squares over the colours of both tones
    # Blur and chroma subsampling move the two tones towards each other, but hardly their mean.
    weights = overlaps.sum(1) / overlaps.sum()
    drawn = tones[0] - tones[1]
    contrast = float((fitted[0] - fitted[1]) @ drawn / (drawn @ drawn))
    return bool(np.linalg.norm(weights @ (fitted - tones)) <= _MAX_COLOUR_OFFSET) and contrast >= _MIN_TEXTURE_CONTRAST
