from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DataType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    kInvalidDataType: _ClassVar[DataType]
    kChar: _ClassVar[DataType]
    kFloat: _ClassVar[DataType]
    kDouble: _ClassVar[DataType]
    kInt8: _ClassVar[DataType]
    kInt32: _ClassVar[DataType]
    kInt64: _ClassVar[DataType]
    kUInt8: _ClassVar[DataType]
    kOFRecord: _ClassVar[DataType]
    kFloat16: _ClassVar[DataType]
    kTensorBuffer: _ClassVar[DataType]
    kBFloat16: _ClassVar[DataType]
    kBool: _ClassVar[DataType]
    kUInt16: _ClassVar[DataType]
    kUInt32: _ClassVar[DataType]
    kUInt64: _ClassVar[DataType]
    kUInt128: _ClassVar[DataType]
    kInt16: _ClassVar[DataType]
    kInt128: _ClassVar[DataType]
    kComplex32: _ClassVar[DataType]
    kComplex64: _ClassVar[DataType]
    kComplex128: _ClassVar[DataType]
    kFloat8E3M4: _ClassVar[DataType]
    kFloat8E4M3: _ClassVar[DataType]
    kFloat8E4M3B11FNUZ: _ClassVar[DataType]
    kFloat8E4M3FN: _ClassVar[DataType]
    kFloat8E4M3FNUZ: _ClassVar[DataType]
    kFloat8E5M2: _ClassVar[DataType]
    kFloat8E5M2FNUZ: _ClassVar[DataType]
    kFloat8E8M0FNU: _ClassVar[DataType]
    kFloat6E2M3FN: _ClassVar[DataType]
    kFloat6E3M2FN: _ClassVar[DataType]
    kFloat4E2M1FN: _ClassVar[DataType]
    kInt4: _ClassVar[DataType]
    kUInt4: _ClassVar[DataType]
    kInt2: _ClassVar[DataType]
    kUInt2: _ClassVar[DataType]
kInvalidDataType: DataType
kChar: DataType
kFloat: DataType
kDouble: DataType
kInt8: DataType
kInt32: DataType
kInt64: DataType
kUInt8: DataType
kOFRecord: DataType
kFloat16: DataType
kTensorBuffer: DataType
kBFloat16: DataType
kBool: DataType
kUInt16: DataType
kUInt32: DataType
kUInt64: DataType
kUInt128: DataType
kInt16: DataType
kInt128: DataType
kComplex32: DataType
kComplex64: DataType
kComplex128: DataType
kFloat8E3M4: DataType
kFloat8E4M3: DataType
kFloat8E4M3B11FNUZ: DataType
kFloat8E4M3FN: DataType
kFloat8E4M3FNUZ: DataType
kFloat8E5M2: DataType
kFloat8E5M2FNUZ: DataType
kFloat8E8M0FNU: DataType
kFloat6E2M3FN: DataType
kFloat6E3M2FN: DataType
kFloat4E2M1FN: DataType
kInt4: DataType
kUInt4: DataType
kInt2: DataType
kUInt2: DataType

class Shape(_message.Message):
    __slots__ = ("dim",)
    DIM_FIELD_NUMBER: _ClassVar[int]
    dim: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, dim: _Optional[_Iterable[int]] = ...) -> None: ...

class VariableMeta(_message.Message):
    __slots__ = ("shape", "data_type")
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_TYPE_FIELD_NUMBER: _ClassVar[int]
    shape: Shape
    data_type: DataType
    def __init__(self, shape: _Optional[_Union[Shape, _Mapping]] = ..., data_type: _Optional[_Union[DataType, str]] = ...) -> None: ...
