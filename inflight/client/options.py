"""What both clients check and hold: the address, the method, the certificates, the size limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc

from inflight.errors import ConfigError

MAX_MESSAGE_BYTES = 512 * 1024 * 1024
CHANNEL_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
]


def check_str(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise ConfigError(f"Parameter '{name}' should be str, but actually {type(value)}")
    if not value:
        raise ConfigError(f"Parameter '{name}' should not be empty str")


def check_target(address: object, servable_name: object, method_name: object, version_number: object) -> None:
    """The four arguments that name what to call.

    Raises:
        ConfigError: one has the wrong type, a name is empty, or the version is negative.
    """
    check_str("address", address)
    check_str("servable_name", servable_name)
    check_str("method_name", method_name)
    if not isinstance(version_number, int):
        raise ConfigError(f"Parameter 'version_number' should be int, but actually {type(version_number)}")
    if version_number < 0:
        raise ConfigError("Parameter 'version_number' should be >= 0")


class SSLConfig:
    """PEM files of a TLS connection; None: not used.

    Args:
        certificate, private_key: the client's own, for a server that asks for them; both or neither.
        custom_ca: the authorities to trust instead of gRPC's default ones.

    Raises:
        ConfigError: one is neither None nor a non-empty str.
    """

    def __init__(
        self, certificate: str | None = None, private_key: str | None = None, custom_ca: str | None = None
    ) -> None:
        for name, value in (
            ("certificate", certificate),
            ("private_key", private_key),
            ("custom_ca", custom_ca),
        ):
            if value is not None:
                check_str(name, value)
        self.certificate = certificate
        self.private_key = private_key
        self.custom_ca = custom_ca


def _read(file: str | None) -> bytes | None:
    if file is None:
        return None
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise ConfigError(
            f"Cannot read the file '{file}' named in ssl_config: {error.strerror}; give the path of a PEM file"
        ) from error


def channel_credentials(ssl_config: object) -> Any | None:
    """gRPC's credentials for `ssl_config`, or None without one.

    Raises:
        ConfigError: not an SSLConfig, a file cannot be read, or only one of certificate and key is given.
    """
    if ssl_config is None:
        return None
    if not isinstance(ssl_config, SSLConfig):
        raise ConfigError("The type of ssl_config should be type of SSLConfig")
    if (ssl_config.certificate is None) != (ssl_config.private_key is None):
        raise ConfigError("The certificate and private_key should be passed at the same time")
    return grpc.ssl_channel_credentials(
        root_certificates=_read(ssl_config.custom_ca),
        private_key=_read(ssl_config.private_key),
        certificate_chain=_read(ssl_config.certificate),
    )
