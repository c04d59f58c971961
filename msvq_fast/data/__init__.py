"""Images in and pictures out: folders, shards, datasets, crops, batches, grids."""

from msvq_fast.data.ahead import read_ahead
from msvq_fast.data.charts import curve_chart, histogram
from msvq_fast.data.dataset import (
    ImageDataset,
    batches,
    batches_per_epoch,
    epoch_order,
    evaluation_tiles,
)
from msvq_fast.data.images import (
    ImagePath,
    ImageReadError,
    StoredImage,
    read_centre,
    read_image,
    relative_names,
    resize_short_side,
    to_float,
)
from msvq_fast.data.listing import list_images, list_labelled_images, list_named_images
from msvq_fast.data.pictures import code_map, save_png, signed_to_uint8, to_uint8, write_whole

__all__ = [
    "ImageDataset",
    "ImagePath",
    "ImageReadError",
    "StoredImage",
    "batches",
    "batches_per_epoch",
    "code_map",
    "curve_chart",
    "epoch_order",
    "evaluation_tiles",
    "histogram",
    "list_images",
    "list_labelled_images",
    "list_named_images",
    "read_ahead",
    "read_centre",
    "read_image",
    "relative_names",
    "resize_short_side",
    "save_png",
    "signed_to_uint8",
    "to_float",
    "to_uint8",
    "write_whole",
]
