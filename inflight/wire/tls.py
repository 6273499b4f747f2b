"""TLS for listeners: TLS 1.2 or newer, ephemeral keys only, client certificates from the configured CA alone."""

from __future__ import annotations

import ssl

from inflight.config import TlsConfig
from inflight.errors import ConfigError

CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"


def server_context(config: TlsConfig, protocol: str) -> ssl.SSLContext:
    """The context of one listener.

    Args:
        protocol: the protocol that ALPN offers, `http/1.1` or `h2`.

    Raises:
        ConfigError: a file cannot be read or has the wrong content, with MindSpore Serving's text.
    """
    if config.verify_client and config.custom_ca is None:
        raise ConfigError("Serving Error: verify_client needs custom_ca, the certificate that signs the clients'")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(CIPHERS)
    context.set_alpn_protocols([protocol])
    _check_certificate(config.certificate, "certificate")
    try:
        # A key with a password would otherwise stop the server at a prompt on the terminal.
        context.load_cert_chain(config.certificate, config.private_key, password=lambda: b"")
    except (OSError, ValueError) as error:  # SSLError is an OSError
        raise _cannot_load("private_key", config.private_key, error) from None
    if config.verify_client and config.custom_ca is not None:
        _check_certificate(config.custom_ca, "custom_ca")
        context.load_verify_locations(cafile=config.custom_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _check_certificate(path: str, name: str) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(cafile=path)
    except (OSError, ValueError) as error:
        raise _cannot_load(name, path, error) from None


def _cannot_load(name: str, path: str, error: Exception) -> ConfigError:
    return ConfigError(f"Serving Error: load {name} from {path} failed: {error}; it must be a PEM file")
