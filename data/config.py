"""What the images are, where they lie, and how they are varied during training."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, Literal

from data.config_checks import check_values
from data.source_names import Source, is_joined, sources_of

TextCleaning = Literal["none", "lower", "canonical"]

_SHARDS = ("webdataset", "parquet")  # kinds
_SAID = ("image_text", *_SHARDS)  # of which somebody has written something
_FILES = ("image_folder", *_SAID)

# Options that have an effect for some kinds only.
_ONLY_FOR = {
    "path": _FILES,
    "val_path": _FILES,
    "fold": ("digits", *_FILES),
    "image_column": ("image_text", "parquet"),
    "caption_column": _SAID,
    "label_column": _SAID,
    "index_dir": _SHARDS,
    "max_bad_share": _FILES,
    "shuffle_window": _SHARDS,
    "weights": _FILES,
    "templates": ("digits", "synthetic", "image_folder", "textures", *_SHARDS),
    "size": ("synthetic",),
    "crops_per_class": ("textures",),
    "eval_transform": _FILES,
    "crop_pct": _FILES,
}


def is_of(kind: str, name: str) -> bool:
    """Whether an option may have an effect for a kind of data."""
    return kind in _ONLY_FOR.get(name, (kind,))


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where images come from, how they are normalised, and how they are augmented (by default, not at all).

    Raises:
        ValueError: for a value out of range, and for an option that would have no effect for the chosen kind.
    """

    kind: Literal["digits", "synthetic", "image_folder", "textures", "image_text", "webdataset", "parquet"] = "digits"
    """Source of images: scikit-learn's handwritten digits, random numbers, a folder of PATH/CLASS/IMAGE files, crops
    of the photographs in scikit-image, a table of images and captions, tar files in the layout of webdataset, or
    parquet files in the layout of Hugging Face's datasets."""

    path: str | None = None
    """image_folder: folder with one sub-folder of images, at any depth, per class; image_text: CSV or TSV file whose
    first row names the columns, paths of images relative to it; webdataset: tar files, by bash's braces
    (shards/train-{000000..000146}.tar) or wildcards; parquet: likewise. Several sources are parted by ::, those of
    another kind or with columns of their own begin with it: folder:PHOTOS::table(label=kind):PAIRS.tsv::tar:SHARDS."""

    val_path: str | None = None
    """Held-out images, as in path, of the same classes; absent: a stratified fifth of path is held out."""

    image_column: str = "image"
    """Column of the images' paths (image_text; rows with the same image are captions of it), or of the images
    (parquet: files' bytes, or a struct of bytes and path)."""

    caption_column: str = "caption"
    """Column of the captions (image_text, parquet), or field of each sample's .json that has them (webdataset; caption:
    only where there is no .txt)."""

    label_column: str | None = None
    """Column of the names of classes (image_text; absent: there are no classes), or field of each sample's .json that
    has its class (webdataset; absent: its .cls); parquet: column of words or numbers, absent: `label`, if there is."""

    index_dir: str | None = None
    """Folder for the indexes of shards (webdataset, parquet); absent: beside each."""

    weights: tuple[float, ...] = ()
    """In training, the shares of the sources that :: parts in path, such as [3, 1]; absent: as many as each has."""

    shuffle_window: int = 0
    """Shards (tar files, or row groups of parquet) of which samples are mixed at a time, their own order shuffled
    before, for file systems that are slow at random places; 0: all."""

    tokenizer: str = "bytes"
    """What makes tokens of texts, where the objective reads texts: bytes (of UTF-8), or the path of a vocabulary of
    CLIP's (bpe_simple_vocab_16e6.txt.gz, tokenizer.json, or the folder of vocab.json and merges.txt), or of a
    sentencepiece model, as SigLIP's (a file .model, or the folder of one)."""

    text_cleaning: TextCleaning = "none"
    """What is done to texts before a sentencepiece model makes tokens of them: nothing, lower case (SigLIP 2), or lower
    case without punctuation (canonical: SigLIP)."""

    text_padding: int | None = None
    """Token that fills up texts, of a sentencepiece model; absent: the one that ends them (SigLIP; SigLIP 2: 0)."""

    templates: str | None = None
    """File of the templates that captions are made of, one a line, such as `a {scale} {class}, {orientation}`;
    absent: those that suit the kind."""

    prompts: str | None = None
    """File of the templates of zero-shot classification, one a line, such as `a photo of a {class}`; absent: those
    that suit the kind."""

    max_bad_share: float = 0.01
    """Largest share of the files' samples that may be bad: missing, damaged, without caption or label. In training
    others are drawn in their place, in evaluation they are left out; bad_samples.jsonl names them. 0: none may be."""

    workers: int = 0
    """Processes that decode and augment ahead of training; 0: in the training process."""

    share_decoding: Literal["auto", "always", "never"] = "auto"
    """Tensor and context ranks, which see the same images, decode a part of each micro-batch each and pass it on to the
    others: auto, where images are files; the numbers are the same."""

    fold: int = 0
    """Which of the 5 stratified folds is held out (digits, and files without val_path)."""

    size: int = 256
    """Training images of the synthetic set; a quarter as many, other ones, are held out."""

    crops_per_class: int = 64
    """Training crops of each photograph (textures only)."""

    images_per_class: int | None = None
    """Training images of each class, drawn by train.seed, the others left out; absent: all."""

    labels_per_class: int | None = None
    """Training images of each class whose label is known, drawn by train.seed; the others stay, without a label, for
    teachers to be shown (objective distillation). Absent: all. images_per_class as many are the same images."""

    mean: tuple[float, ...] = (0.5,)
    """Subtracted from pixels in 0..1: one number, or one per channel."""

    std: tuple[float, ...] = (0.5,)
    """Divides the pixels after the mean is subtracted: one number, or one per channel."""

    eval_transform: Literal["centre", "timm", "big_vision", "big_vision_resize"] = "centre"
    """How image files are brought to the model's size, random crops apart: the largest centred box; as timm does (the
    shorter side to size / crop_pct, bicubic, then the centre); as big_vision's resize_small and central_crop; or as its
    resize, without a crop. See docs/data.md."""

    crop_pct: float | None = None
    """With timm and big_vision, the part of the shorter side that is seen; absent: 0.875."""

    variable_resolution: float = 0.0
    """Images keep their aspect ratio, and in training the number of an image's patches is drawn anew each time, evenly
    up to this much (0.5: half) below and above that of a model.image_size image, which most of a held-out image has;
    0: all images have the size model.image_size."""

    rotate: float = 0.0
    """Augmentation: largest rotation to either side, in degrees."""

    shift: float = 0.0
    """Augmentation: largest shift along either side, as a fraction of that side."""

    scale: float = 0.0
    """Augmentation: largest relative zoom, 0.1 zooms by 1/1.1 to 1.1."""

    shear: float = 0.0
    """Augmentation: largest horizontal shear to either side, in degrees."""

    flip: bool = False
    """Augmentation: mirror half of the images, chosen at random, left to right."""

    crop_min_area: float = 1.0
    """Augmentation: random resized crop, smallest part of the largest possible crop's area; 1: off."""

    brightness: float = 0.0
    """Augmentation: largest relative change of brightness, 0.2 multiplies pixels by 1/1.2 to 1.2."""

    contrast: float = 0.0
    """Augmentation: largest relative change of the distance of pixels from their mean."""

    saturation: float = 0.0
    """Augmentation: largest relative change of the distance of colours from the grey that is as bright."""

    hue: float = 0.0
    """Augmentation: largest turn of hues to either side, as a fraction of the whole circle, to 0.5."""

    grey: float = 0.0
    """Augmentation: share of images that lose their colours."""

    blur: float = 0.0
    """Augmentation: largest standard deviation of a Gaussian blur, in pixels."""

    noise: float = 0.0
    """Augmentation: largest standard deviation of Gaussian noise, for pixels in 0..1."""

    rand_augment: str | None = None
    """Augmentation: RandAugment, as timm writes and defines it: rand-m9-n2-mstd0.5-inc1; 3-Augment: rand-n1-p1-t3a."""

    erase: float = 0.0
    """Augmentation: share of images of which a random rectangle, of 2 to 33 % of the area, is erased."""

    erase_fill: Literal["pixel", "rand", "const"] = "pixel"
    """What is there then: noise, for each pixel or one colour for all, or the mean, in timm's words."""

    mixup: float = 0.0
    """Augmentation: Mixup, images are mixed with others in shares of the beta distribution of this alpha, such as 0.8;
    their labels in the same shares. 0: off."""

    cutmix: float = 0.0
    """Augmentation: CutMix, a rectangle of an image is another's, of an area that is drawn likewise. 0: off."""

    mix_probability: float = 1.0
    """Share of images that are mixed, where mixup or cutmix are set."""

    cutmix_switch: float = 0.5
    """Share of these by CutMix, where both are set."""

    views: int = 1
    """2: each image comes twice, augmented independently, for objectives that compare views of an image."""

    local_crops: int = 0
    """Multi-crop (SwAV, DINO), beside two views: further views of each image, of small parts of it, at the same size;
    they are compared with the two views, and not with each other. 0: none."""

    local_crop_area: tuple[float, float] = (0.05, 0.4)
    """Smallest and largest part of the largest possible crop's area that they are of; the two views: crop_min_area."""

    repeats: int = 1
    """How many times in a row each image comes in training, each time augmented anew and, as far as somebody has
    written several (image_text), with another caption; an epoch is as many times longer."""

    vary_held_out: bool = False
    """Held-out images are augmented, too, each the same way in every run, so that captions tell them apart."""

    def __post_init__(self) -> None:
        self._check_kind()
        check_values(self)

    @property
    def all_views(self) -> int:
        """Rows of each sample in a micro-batch: its views, then its local crops."""
        return self.views + self.local_crops

    @property
    def one_view(self) -> DataConfig:
        """The same, each image once."""
        return replace(self, views=1, local_crops=0, local_crop_area=DataConfig.local_crop_area)

    @property
    def reads_files(self) -> bool:
        """Whether samples are files of the user's, of which some may be bad."""
        return self.kind in _FILES

    @property
    def mends(self) -> bool:
        """Whether samples may be bad without an end of the run."""
        return self.reads_files and self.max_bad_share > 0

    @property
    def warps(self) -> bool:
        """Whether augmentation turns, shifts, zooms or shears."""
        return any((self.rotate, self.shift, self.scale, self.shear))

    @property
    def recolours(self) -> bool:
        """Whether augmentation changes pixels where they are."""
        return any((self.brightness, self.contrast, self.saturation, self.hue, self.grey, self.blur, self.noise))

    @property
    def crops(self) -> bool:
        """Whether augmentation cuts random crops."""
        return self.crop_min_area < 1

    @property
    def varies(self) -> bool:
        """Whether augmentation does anything."""
        changes = (self.warps, self.recolours, self.crops, self.flip, self.rand_augment, self.erase, self.mixes)
        return any(changes)

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with others, and their labels."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def images_together(self) -> int:
        """Of how many images a micro-batch has a multiple: those of several sizes share their room in pairs."""
        return 2 if self.variable_resolution else 1

    @property
    def is_joined(self) -> bool:
        """Whether images are of several sources that no one kind opens by itself."""
        return any(is_joined(sources, self.kind, _SHARDS) for sources in self._sources().values())

    @property
    def without_kinds(self) -> DataConfig:
        """The same, where all sources are of `kind`, and paths need not say so."""
        plain: dict[str, Any] = {
            name: "::".join(source.path for source in sources) for name, sources in self._sources().items()
        }
        return replace(self, **plain) if plain else self

    def of_source(self, source: Source) -> DataConfig:
        """What this says of one of its sources, by itself."""
        others = self.without_effect(source.kind)
        own: dict[str, Any] = {"kind": source.kind, "path": source.path, "val_path": None, "fold": 0, "weights": ()}
        columns = {f"{name}_column": column for name, column in source.columns.items()}
        return replace(self, **others | own | columns)

    @classmethod
    def without_effect(cls, kind: str) -> dict[str, Any]:
        """Keys that have none with a kind, and their defaults."""
        return {name: cls._defaults()[name] for name, kinds in _ONLY_FOR.items() if kind not in kinds}

    def _sources(self) -> dict[str, list[Source]]:
        """Of path and val_path, if they are given."""
        if self.kind not in _FILES:
            return {}
        given = {"path": self.path, "val_path": self.val_path}
        return {name: sources_of(path, self.kind, f"data.{name}") for name, path in given.items() if path}

    @classmethod
    def _defaults(cls) -> dict[str, Any]:
        return {field.name: field.default for field in fields(cls) if field.default is not MISSING}

    def _check_kind(self) -> None:
        defaults, ours = self._defaults(), {source.kind for sources in self._sources().values() for source in sources}
        for name, kinds in _ONLY_FOR.items():
            value = getattr(self, name)
            if not (ours | {self.kind}) & set(kinds) and value != defaults[name]:
                raise ValueError(
                    f"data.{name} is {value!r}, but has no effect with data.kind={self.kind}: remove it, or "
                    f"set data.kind to {' or '.join(kinds)}"
                )
        if self.kind in _FILES and not self.path:
            wanted = {
                "image_folder": "the folder of PATH/CLASS/IMAGE",
                "image_text": "the CSV or TSV file",
                "webdataset": "the tar files, such as shards/train-{000000..000146}.tar",
                "parquet": "the parquet files, such as data/train-{00000..00012}-of-00013.parquet",
            }[self.kind]
            raise ValueError(f"data.kind is {self.kind}, but data.path is not set: give {wanted}")
        if self.weights and (count := len(self._sources()["path"])) == 1:
            raise ValueError("data.weights has no effect with one source: remove it, or give several in data.path")
        if self.weights and len(self.weights) != count:
            raise ValueError(
                f"data.weights has {len(self.weights)} numbers, and data.path={self.path} {count} sources, parted by "
                "::: give one for each"
            )
        if self.val_path is not None and not self.val_path:
            raise ValueError("data.val_path is empty: give the held-out images, or remove it")
        if self.val_path is not None and self.fold != 0:
            raise ValueError(
                f"data.fold is {self.fold}, but has no effect with data.val_path={self.val_path!r}: remove one of them"
            )
