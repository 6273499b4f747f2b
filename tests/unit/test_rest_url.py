"""URLs of the REST interface: the documented form, the odd ones that work too, and what the rest is answered."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from inflight.errors import InvalidRequest
from inflight.frontends.mindspore.url import Target, parse_url


@pytest.mark.parametrize(
    ("url", "target"),
    [
        (b"/model/add:add_common", ("add", 0, "add_common")),
        (b"/model/add/version/0:add_common", ("add", 0, "add_common")),
        (b"/model/add/version/3:add_common", ("add", 3, "add_common")),
        (b"/model/add/version/4294967294:m", ("add", 4294967294, "m")),
        (b"/model/add/version/1abc:m", ("add", 1, "m")),
        (b"/model/add/version/+7:m", ("add", 7, "m")),
        (b"/model/add/version/0000000000000000000000001:m", ("add", 1, "m")),
        # The order is free, and what stands around does not matter.
        (b"/version/0/model/add:m", ("add", 0, "m")),
        (b"/version/12/model/add:m", ("add", 12, "m")),
        (b"/api/model/add/x/y:m", ("add", 0, "m")),
        (b"/model/add/version/2/x:m", ("add", 2, "m")),
        (b"/modelXadd:m", ("add", 0, "m")),
        # Everything behind the first colon is the method; nothing is decoded.
        (b"/model/add:m:n/o", ("add", 0, "m:n/o")),
        (b"/model/add:m?x=1", ("add", 0, "m?x=1")),
        (b"/model/a%64d:m%20", ("a%64d", 0, "m%20")),
        # Names may hold the words that the scanner looks for.
        (b"/model/conversion:m", ("conversion", 0, "m")),
        (b"/model/my_version/version/2:version_of", ("my_version", 2, "version_of")),
        (b"/model/model:model", ("model", 0, "model")),
        ("/model/模型:方法".encode(), ("模型", 0, "方法")),
    ],
)
def test_target(url: bytes, target: tuple[str, int, str]) -> None:
    assert parse_url(url) == target


@pytest.mark.parametrize(
    ("url", "text"),
    [
        (b"/x/:add_common", "please check url, the keyword:[model] must contain"),
        (b"/", "please check url, the keyword:[model] must contain"),
        (b"", "please check url, the keyword:[model] must contain"),
        (b"/model", "please check url, the keyword:[model] must contain"),
        (b"/model/", "please check url, the keyword:[model] must contain"),
        (b"/model/:m", "please check url, the keyword:[model] must contain"),
        (b"/v1/models/x:m", "please check url, the keyword:[model] must contain"),
        (b"/model/add", "please check url, the keyword:[service method] must contain."),
        (b"/model/add:", "please check url, the keyword:[service method] must contain."),
        (b"/model/add/version/1", "please check url, the keyword:[service method] must contain."),
        (b"/model/add/version/-1:m", "please check url, version number range failed"),
        (b"/model/add/version/4294967295:m", "please check url, version number range failed"),
        (b"/model/add/version/99999999999999999999999:m", "please check url, version number range failed"),
        (b"/model/add/version/" + b"9" * 9000 + b":m", "please check url, version number range failed"),
        (b"/model/add/version/abc:m", "keyword:[version] value invalid, request version number abc"),
        (b"/model/add/version/:m", "keyword:[version] value invalid"),
        (b"/model/add/version:m", "keyword:[version] value invalid"),
        (b"/api/model/conversion:m", "keyword:[version] value invalid"),
    ],
)
def test_errors(url: bytes, text: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        parse_url(url)
    assert text in str(error.value)


NAMES = st.text(st.characters(exclude_characters="/:", codec="utf-8"), min_size=1)


@given(NAMES, st.none() | st.integers(0, 2**32 - 2), st.text(st.characters(codec="utf-8"), min_size=1))
def test_any_name_in_the_documented_form(servable: str, version: int | None, method: str) -> None:
    part = "" if version is None else f"/version/{version}"
    url = f"/model/{servable}{part}:{method}".encode()
    assert parse_url(url) == Target(servable, version or 0, method)


PIECES = st.lists(st.sampled_from([b"/", b"model", b"version", b":", b"1", b"-", b" ", b"x", b"\xff", b"%00"]))


@given(st.binary() | PIECES.map(b"".join))
@example(b"version")
@example(b"model:version")
def test_any_bytes_are_a_target_or_an_error(url: bytes) -> None:
    try:
        target = parse_url(url)
    except InvalidRequest:
        return
    assert target.servable
    assert target.method
    assert 0 <= target.version < 2**32 - 1
