from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Variable(_message.Message):
    __slots__ = ("name", "folder", "shape", "data_type", "size", "encoding", "attributes", "digests", "alias_of", "meta_digest", "content_digests", "regions")
    NAME_FIELD_NUMBER: _ClassVar[int]
    FOLDER_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_TYPE_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    ALIAS_OF_FIELD_NUMBER: _ClassVar[int]
    META_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CONTENT_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    REGIONS_FIELD_NUMBER: _ClassVar[int]
    name: str
    folder: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    data_type: int
    size: int
    encoding: str
    attributes: str
    digests: bytes
    alias_of: str
    meta_digest: bytes
    content_digests: bytes
    regions: _containers.RepeatedCompositeFieldContainer[Region]
    def __init__(self, name: _Optional[str] = ..., folder: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., data_type: _Optional[int] = ..., size: _Optional[int] = ..., encoding: _Optional[str] = ..., attributes: _Optional[str] = ..., digests: _Optional[bytes] = ..., alias_of: _Optional[str] = ..., meta_digest: _Optional[bytes] = ..., content_digests: _Optional[bytes] = ..., regions: _Optional[_Iterable[_Union[Region, _Mapping]]] = ...) -> None: ...

class Region(_message.Message):
    __slots__ = ("offsets", "sizes", "digests")
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    SIZES_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    offsets: _containers.RepeatedScalarFieldContainer[int]
    sizes: _containers.RepeatedScalarFieldContainer[int]
    digests: bytes
    def __init__(self, offsets: _Optional[_Iterable[int]] = ..., sizes: _Optional[_Iterable[int]] = ..., digests: _Optional[bytes] = ...) -> None: ...

class File(_message.Message):
    __slots__ = ("name", "size", "digests", "kind", "attributes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    size: int
    digests: bytes
    kind: str
    attributes: str
    def __init__(self, name: _Optional[str] = ..., size: _Optional[int] = ..., digests: _Optional[bytes] = ..., kind: _Optional[str] = ..., attributes: _Optional[str] = ...) -> None: ...

class Manifest(_message.Message):
    __slots__ = ("format_version", "writer", "time_ns", "attributes", "tree", "variables", "files", "unshared")
    FORMAT_VERSION_FIELD_NUMBER: _ClassVar[int]
    WRITER_FIELD_NUMBER: _ClassVar[int]
    TIME_NS_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    TREE_FIELD_NUMBER: _ClassVar[int]
    VARIABLES_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    UNSHARED_FIELD_NUMBER: _ClassVar[int]
    format_version: int
    writer: str
    time_ns: int
    attributes: str
    tree: str
    variables: _containers.RepeatedCompositeFieldContainer[Variable]
    files: _containers.RepeatedCompositeFieldContainer[File]
    unshared: bool
    def __init__(self, format_version: _Optional[int] = ..., writer: _Optional[str] = ..., time_ns: _Optional[int] = ..., attributes: _Optional[str] = ..., tree: _Optional[str] = ..., variables: _Optional[_Iterable[_Union[Variable, _Mapping]]] = ..., files: _Optional[_Iterable[_Union[File, _Mapping]]] = ..., unshared: bool = ...) -> None: ...
