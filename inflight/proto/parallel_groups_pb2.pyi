from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Ranks(_message.Message):
    __slots__ = ("dim",)
    DIM_FIELD_NUMBER: _ClassVar[int]
    dim: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, dim: _Optional[_Iterable[int]] = ...) -> None: ...

class Group(_message.Message):
    __slots__ = ("group_name", "parallel_group_ranks")
    GROUP_NAME_FIELD_NUMBER: _ClassVar[int]
    PARALLEL_GROUP_RANKS_FIELD_NUMBER: _ClassVar[int]
    group_name: str
    parallel_group_ranks: Ranks
    def __init__(self, group_name: _Optional[str] = ..., parallel_group_ranks: _Optional[_Union[Ranks, _Mapping]] = ...) -> None: ...

class Groups(_message.Message):
    __slots__ = ("parallel_group_item",)
    PARALLEL_GROUP_ITEM_FIELD_NUMBER: _ClassVar[int]
    parallel_group_item: _containers.RepeatedCompositeFieldContainer[Group]
    def __init__(self, parallel_group_item: _Optional[_Iterable[_Union[Group, _Mapping]]] = ...) -> None: ...
