"""Opens encrypted MindIR files.

An encrypted file is a chain of blocks of up to 64 MiB of plain text. One block is, with little-endian uint32s:

    magic | [AES-GCM: tag, 16 bytes] | length of the rest | iv length | iv | cipher length | cipher

The magic names the mode. AES-GCM uses the first 12 bytes of the iv as nonce and no associated data; the CBC modes
are padded as PKCS#7 says.
"""

from __future__ import annotations

import struct
from typing import Any

from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from cryptography.hazmat.primitives.padding import PKCS7

from inflight.errors import StartError

_MODES = {0x7F3A5ED8: "AES-GCM", 0x7F3A5ED9: "AES-CBC", 0x7F3A5EDA: "SM4-CBC"}
_KEY_LENGTHS = {"AES-GCM": (16, 24, 32), "AES-CBC": (16, 24, 32), "SM4-CBC": (16,)}
_UINT32 = struct.Struct("<I")
_TAG_LENGTH = 16
_NONCE_LENGTH = 12
_IV_LENGTH = 16
_BLOCK_BITS = 128


def encryption_mode(data: bytes) -> str | None:
    """`AES-GCM`, `AES-CBC` or `SM4-CBC` where these are the first bytes of an encrypted file, else None."""
    if len(data) < _UINT32.size:
        return None
    return _MODES.get(_UINT32.unpack_from(data)[0])


def decrypt(data: bytes, key: bytes | None, mode: str, name: str) -> bytes:
    """The decrypted content of a MindIR file; a plain file is returned unchanged, if no key is given.

    Args:
        key: 16, 24 or 32 bytes (SM4: 16).
        mode: `AES-GCM`, `AES-CBC` or `SM4-CBC`, in any case.
        name: how error texts call the file.

    Raises:
        StartError: a key is missing, wrong or given for a plain file; the mode is another one than the file's; the
            file is damaged; SM4 is not part of the installed OpenSSL.
    """
    actual = encryption_mode(data)
    if actual is None:
        if key is not None:
            raise StartError(f"Load model failed, '{name}' is not encrypted: start the servable without dec_key")
        return data
    if key is None:
        raise StartError(
            f"Load model failed, '{name}' is encrypted with {actual}: give its key as dec_key and dec_mode='{actual}'"
        )
    if mode.upper() != actual:
        raise StartError(
            f"Load model failed, '{name}' is encrypted with {actual}, but dec_mode is '{mode}': use dec_mode='{actual}'"
        )
    if len(key) not in _KEY_LENGTHS[actual]:
        lengths = " or ".join(str(length) for length in _KEY_LENGTHS[actual])
        raise StartError(f"Load model failed, dec_key has {len(key)} bytes: {actual} takes {lengths}")
    plain: list[bytes] = []
    position = 0
    while position < len(data):
        block, position = _decrypt_block(data, position, key, actual, name)
        plain.append(block)
    return b"".join(plain)


def _decrypt_block(data: bytes, position: int, key: bytes, mode: str, name: str) -> tuple[bytes, int]:
    """One block's plain text, and where the next block begins."""
    if encryption_mode(data[position : position + _UINT32.size]) != mode:
        raise _damaged(name)
    position += _UINT32.size
    tag = b""
    if mode == "AES-GCM":
        tag, position = _take(data, position, _TAG_LENGTH, name)
    rest, position = _take_length(data, position, name)
    end = position + rest
    iv_length, position = _take_length(data, position, name)
    iv, position = _take(data, position, iv_length, name)
    cipher_length, position = _take_length(data, position, name)
    cipher, position = _take(data, position, cipher_length, name)
    if position != end or iv_length != _IV_LENGTH:
        raise _damaged(name)
    return _open(cipher, iv, tag, key, mode, name), position


def _open(cipher: bytes, iv: bytes, tag: bytes, key: bytes, mode: str, name: str) -> bytes:
    wrong = StartError(
        f"Load model failed, '{name}' cannot be decrypted with {mode}: dec_key is not the key it was exported with, "
        "or the file is damaged"
    )
    try:
        context = _cipher(iv, tag, key, mode).decryptor()
        if mode == "AES-GCM":
            return _run(context, cipher)
        unpadder = PKCS7(_BLOCK_BITS).unpadder()
        return unpadder.update(_run(context, cipher)) + unpadder.finalize()
    except UnsupportedAlgorithm:
        raise StartError(
            f"Load model failed, '{name}' is encrypted with {mode}, which the installed OpenSSL does not have: "
            "export the model with enc_mode='AES-GCM'"
        ) from None
    except (InvalidTag, ValueError):
        raise wrong from None


def _cipher(iv: bytes, tag: bytes, key: bytes, mode: str) -> Cipher[Any]:
    if mode == "AES-GCM":
        return Cipher(algorithms.AES(key), modes.GCM(iv[:_NONCE_LENGTH], tag))
    if mode == "AES-CBC":
        return Cipher(algorithms.AES(key), modes.CBC(iv))
    return Cipher(algorithms.SM4(key), modes.CBC(iv))


def _run(context: CipherContext, cipher: bytes) -> bytes:
    return context.update(cipher) + context.finalize()


def _take(data: bytes, position: int, count: int, name: str) -> tuple[bytes, int]:
    if position + count > len(data):
        raise _damaged(name)
    return data[position : position + count], position + count


def _take_length(data: bytes, position: int, name: str) -> tuple[int, int]:
    field, position = _take(data, position, _UINT32.size, name)
    return int(_UINT32.unpack(field)[0]), position


def _damaged(name: str) -> StartError:
    return StartError(f"Load model failed, '{name}' is cut short or damaged: copy it again from where it was exported")
