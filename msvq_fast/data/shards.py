"""Images in tar shards of the WebDataset layout, each read where it lies."""

from __future__ import annotations

import functools
import glob
import itertools
import os
import posixpath
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path

from msvq_fast.data.images import EXTENSIONS, StoredImage
from msvq_fast.ops.checks import InputError

_BLOCK = tarfile.BLOCKSIZE
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
# Of folders too. The first of one part wins, and ``test`` is held out only where no other is.
PART_NAMES = {"train": "train", "val": "val", "validation": "val", "test": "val"}


@dataclass(frozen=True, slots=True)
class TarImage(StoredImage):
    """A member of an uncompressed tar file, which is its container.

    Its class is the text of the member ``.cls`` beside it, else the first folder of its name.

    Attributes:
        offset: of its first byte there.
    """

    size: int
    offset: int

    def read(self) -> bytes:
        """Opens the shard as a file of a folder would be opened: nothing is shared or kept."""
        with open(self.container, "rb") as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) < self.size:
            raise OSError(f"the shard ends {self.size - len(content)} bytes too early")
        return content


@dataclass(frozen=True, slots=True)
class BrokenLink(StoredImage):
    """A member that links to what its shard does not hold: listed, so that it is named.

    Attributes:
        target: what it links to.
    """

    target: str

    def read(self) -> bytes:
        """There is nothing to read."""
        raise OSError(f"a link to {self.target!r}, which is no file of the shard")


def list_members(pattern: str, split: str) -> tuple[dict[str, StoredImage], bool]:
    """The images of the shards of ``wds:pattern``, sorted by name.

    Shards that call themselves ``train`` and others that call themselves ``val`` or
    ``validation``, or ``test`` where none does, as a word of their path, are the splits; other
    shards are in ``"all"`` only.

    Returns:
        ``{name: image}``, names as if each shard were a folder of its members below the part of
        ``pattern`` that is no pattern, and whether they are those of ``split`` alone.

    Raises:
        InputError: no such shard, a compressed, damaged or truncated one, or no image.
    """
    root, shards = _find_shards(pattern)
    names = {shard: shard.relative_to(root).as_posix() for shard in shards}
    parts = {shard: _own_part(name, test=False) for shard, name in names.items()}
    if "val" not in parts.values():
        parts = {shard: _own_part(name, test=True) for shard, name in names.items()}
    settled = split != "all" and {"train", "val"} <= set(parts.values())
    if settled:
        shards = [shard for shard in shards if parts[shard] == split]
    images = {}
    for shard in shards:
        status = shard.stat()
        for image in _index(shard, status.st_size, status.st_mtime_ns):
            images[f"{names[shard]}/{image.member}"] = image
    if not images:
        looked_for = " ".join(EXTENSIONS)
        raise InputError(f"data 'wds:{pattern}' has no image; looked for {looked_for}")
    return {name: images[name] for name in sorted(images)}, settled


def _find_shards(pattern: str) -> tuple[Path, list[Path]]:
    """The folder before the first wildcard or brace, and the shards, sorted."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", pattern):  # one letter is a Windows drive
        raise InputError(f"data 'wds:{pattern}' is not on this machine; download the shards first")
    pattern = os.path.expanduser(pattern)
    root = Path(os.path.dirname(re.split(r"[*?\[{]", pattern, maxsplit=1)[0]))
    found: set[Path] = set()
    for place in _expand(pattern):
        matches = [match for match in glob.glob(place, recursive=True) if os.path.exists(match)]
        if not matches:
            raise InputError(f"data 'wds:{pattern}': there is no shard {place!r}")
        found.update(Path(match) for match in matches)
    for shard in found:
        if shard.is_dir():
            raise InputError(
                f"data 'wds:{pattern}': {str(shard)!r} is a folder; give its shards as "
                f"'wds:{shard / '*.tar'}'"
            )
    return root, sorted(found)


def _expand(pattern: str) -> list[str]:
    """Braces as a shell expands them: ``{000..009}``, ``{train,val}``, nested too."""
    start = pattern.find("{")
    if start < 0:
        return [pattern]
    depth, cuts = 0, [start]
    for end in range(start, len(pattern)):
        depth += (pattern[end] == "{") - (pattern[end] == "}")
        if depth == 0:
            break
        if depth == 1 and pattern[end] == ",":
            cuts.append(end)
    else:
        raise InputError(f"data 'wds:...': the brace {pattern[start:]!r} is not closed")
    choices = [pattern[a + 1 : b] for a, b in itertools.pairwise([*cuts, end])]
    if len(choices) == 1:
        bounds = re.fullmatch(r"(\d+)\.\.(\d+)", choices[0])
        if bounds is None or int(bounds[1]) > int(bounds[2]):
            raise InputError(
                f"data 'wds:...': {{{choices[0]}}} is neither a range such as {{000..009}} nor a "
                "choice such as {train,val}"
            )
        padded = any(re.match("0[0-9]", bound) for bound in bounds.groups())
        width = max(map(len, bounds.groups())) if padded else 0
        choices = [f"{i:0{width}}" for i in range(int(bounds[1]), int(bounds[2]) + 1)]
    tails = _expand(pattern[end + 1 :])
    heads = [pattern[:start] + text for choice in choices for text in _expand(choice)]
    return [head + tail for head in heads for tail in tails]


def _own_part(name: str, *, test: bool) -> str | None:
    """``train`` or ``val`` if a shard's name has that word and not the other's, else None.

    Args:
        name: below the part of the pattern that is no pattern.
        test: whether ``test`` stands for ``val``, else it is no such word.
    """
    words = set(re.split(r"[^a-z]+", name.lower())) - (set() if test else {"test"})
    found = {PART_NAMES[word] for word in words if word in PART_NAMES}
    return found.pop() if len(found) == 1 else None


class _Header(tarfile.TarInfo):
    """Reads of the header of an ordinary member what an index needs: in a third of the time."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        if len(buf) == _BLOCK and buf[156:157] == tarfile.REGTYPE and not buf[345]:
            checksum = sum(buf) - sum(buf[148:156]) + 8 * ord(" ")
            try:
                if checksum == int(buf[148:156].strip(b" \0"), 8):
                    info = cls(buf[:100].partition(b"\0")[0].decode(encoding, errors))
                    info.size = int(buf[124:136].strip(b" \0"), 8)
                    return info
            except ValueError:
                pass  # the slow way says what is wrong, or reads the rarer notation
        return super().frombuf(buf, encoding, errors)


@functools.cache
def _index(shard: Path, size: int, changed: int) -> tuple[StoredImage, ...]:
    """The images of a shard; read once as long as its size and time of change stay."""
    files: dict[str, tuple[int, int]] = {}  # size and offset of all members, which links may name
    found: dict[str, tuple[int, int] | str] = {}  # those of images, or what they link to
    labels: dict[str, str] = {}
    try:
        with open(shard, "rb") as file:
            start = file.read(_BLOCK)
            for magic, kind in _PACKED.items():
                if start.startswith(magic):
                    raise InputError(
                        f"shard {str(shard)!r} is compressed ({kind}), which allows no access to "
                        "single images; uncompress it"
                    )
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:", tarinfo=_Header) as tar:
                for info in tar:
                    # A negative size would lead back to headers read before, for ever.
                    if info.size < 0 or tar.offset < info.offset_data:
                        raise tarfile.ReadError(f"a negative size at byte {info.offset}")
                    member = _plain_name(info.name)
                    key, extension = _split_name(member)
                    place: tuple[int, int] | str
                    if info.isreg():
                        place = info.size, info.offset_data
                    elif info.islnk():  # as a second name of a file before it is stored
                        target = _plain_name(info.linkname)
                        place = files.get(target, target)
                    elif info.issym():  # may name a file after it
                        place = posixpath.join(posixpath.dirname(member), info.linkname)
                    else:
                        continue
                    if not isinstance(place, str):
                        files[member] = place
                    if _is_image(member):  # of equal names the last is valid
                        found[member] = place
                    elif extension == ".cls" and not isinstance(place, str) and place[0] <= _BLOCK:
                        file.seek(place[1])
                        labels[key] = file.read(place[0]).decode(errors="replace").strip()
            # tarfile takes a broken header and a cut between two members for the end.
            file.seek(tar.offset)
            end = file.read(_BLOCK)
            if end != bytes(_BLOCK):
                what = "a broken header" if len(end) == _BLOCK else "no end mark"
                raise tarfile.ReadError(f"{what} at byte {tar.offset}")
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"cannot read shard {str(shard)!r}: {error.strerror}") from error
    except Exception as error:  # tarfile meets odd headers with exceptions of any kind
        raise InputError(f"shard {str(shard)!r} is not a whole tar file: {error}") from error
    images: list[StoredImage] = []
    for member, place in found.items():
        folder, below, _ = member.partition("/")
        label = labels.get(_split_name(member)[0]) or (folder if below else None)
        if isinstance(place, str):
            place = files.get(posixpath.normpath(place), place)
        if isinstance(place, str):
            images.append(BrokenLink(shard, member, None, label, place))
        else:
            images.append(TarImage(shard, member, place[0], label, place[1]))
    return tuple(images)


def _plain_name(name: str) -> str:
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def _split_name(member: str) -> tuple[str, str]:
    """What members of one sample share, and the extension: all from the name's first dot on."""
    folder, slash, name = member.rpartition("/")
    stem, dot, extension = name.partition(".")
    return folder + slash + stem, (dot + extension).lower()


def _is_image(member: str) -> bool:
    """Whether it is no hidden file and its extension an image's: no ``.seg.png``."""
    hidden = any(part.startswith(".") for part in member.split("/"))
    return _split_name(member)[1] in EXTENSIONS and not hidden
