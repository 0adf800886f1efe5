"""A source's posterior as a file, which stands for the source in later runs on other targets (`prior=PATH`).

A safetensors file: the tensors, and in its metadata what they are of (format version, kind, classes, fingerprint of the
features, settings) with a digest of it all. Equal posteriors give equal bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from transfer_cli.errors import TransferError

FILE = "source_posterior.safetensors"  # its name in a run's folder
FORMAT, VERSION = (
    "transfer.source_posterior",
    1,
)  # the version is raised when older programs could not read a file rightly
TENSORS = {  # by kind, those that a file must hold
    "head": ("counts", "means", "whitening", "mean", "factor", "diagonal", "temperature"),
}


@dataclass(frozen=True)
class SourcePosterior:
    """`kind`: `head`, a softmax head on frozen features; `classes` of the source;
    `fingerprint` of what the posterior lives on; `settings`: choices that its user has to share, and words for people."""

    kind: str
    classes: tuple[str, ...]
    fingerprint: str
    settings: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def to_bytes(self) -> bytes:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
        about = {
            "kind": self.kind,
            "classes": list(self.classes),
            "fingerprint": self.fingerprint,
            "settings": dict(self.settings),
        }
        text = json.dumps(about, sort_keys=True)
        # One entry: safetensors keeps several in no order.
        whole = {"format": FORMAT, "version": VERSION, "about": text, "digest": _digest(text, tensors)}
        return save(tensors, {FORMAT: json.dumps(whole, sort_keys=True)})

    @classmethod
    def read(cls, path: str) -> SourcePosterior:
        """Raises:
        TransferError: no such file, one of another kind, of a later version, or not whole."""
        if not Path(path).is_file():
            raise TransferError(f"prior: there is no file {path}; a run of method=source_posterior writes one.")
        try:
            # All of it into memory: tensors mapped from a file that a later run replaces would fall away with it.
            data = Path(path).read_bytes()
            tensors = load(data)
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            whole = json.loads(header.get("__metadata__", {}).get(FORMAT, "{}"))
        except (SafetensorError, OSError, ValueError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise TransferError(f"prior: {path} is damaged, or no safetensors file ({reason}).") from error
        if whole.get("format") != FORMAT:
            raise TransferError(
                f"prior: {path} holds tensors, but no source's posterior: take the {FILE} of a run of method=source_posterior."
            )
        if int(whole["version"]) > VERSION:
            raise TransferError(
                f"prior: {path} is of format {whole['version']}, and this program reads up to {VERSION}: update transfer-cli."
            )
        if whole["digest"] != _digest(whole["about"], tensors):
            raise TransferError(f"prior: {path} is damaged: its content does not have the digest that it states.")
        about = json.loads(whole["about"])
        lacking = [name for name in TENSORS.get(about["kind"], ()) if name not in tensors]
        if about["kind"] not in TENSORS or lacking:
            raise TransferError(
                f"prior: {path} is of kind '{about['kind']}' and lacks {', '.join(lacking) or 'a reader'}."
            )
        return cls(about["kind"], tuple(about["classes"]), about["fingerprint"], about["settings"], tensors)


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
