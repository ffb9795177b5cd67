// libnnopbase.so: tensors and executors.
#pragma GCC visibility push(default)
#include "aclnn/aclnn_base.h"
#pragma GCC visibility pop

#include "core.h"

using evenmoe::ask;
using evenmoe::Reply;
using evenmoe::Value;

namespace {

constexpr uint64_t kMostDims = 25;  // a list said to be longer is not read; its length is an error in the bridge

Value dims(const int64_t *first, uint64_t count)
{
    return Value(first, count <= kMostDims ? count : 0);
}

}  // namespace

aclnnStatus aclnnInit(const char *)
{
    return 0;
}

aclnnStatus aclnnFinalize(void)
{
    return 0;
}

aclTensor *aclCreateTensor(const int64_t *viewDims, uint64_t viewDimsNum, aclDataType dataType, const int64_t *stride,
                           int64_t offset, aclFormat format, const int64_t *storageDims, uint64_t storageDimsNum,
                           void *tensorData)
{
    const Reply reply = ask("create_tensor", {dims(viewDims, viewDimsNum), viewDimsNum, dataType,
                                              dims(stride, viewDimsNum), offset, format,
                                              dims(storageDims, storageDimsNum), storageDimsNum, tensorData});
    return reply.status == 0 ? reinterpret_cast<aclTensor *>(reply.numbers[0]) : nullptr;
}

aclnnStatus aclDestroyTensor(const aclTensor *tensor)
{
    return ask("destroy_tensor", {tensor}).status;
}

aclIntArray *aclCreateIntArray(const int64_t *value, uint64_t size)
{
    const std::vector<int64_t> none(1);
    const Value list = size == 0 ? Value(none.data(), 0) : Value(value, size);  // nothing is read of an empty array
    const Reply reply = ask("create_int_array", {list});
    return reply.status == 0 ? reinterpret_cast<aclIntArray *>(reply.numbers[0]) : nullptr;
}

aclnnStatus aclDestroyIntArray(const aclIntArray *array)
{
    return ask("destroy_int_array", {array}).status;
}

aclnnStatus aclGetIntArraySize(const aclIntArray *array, uint64_t *size)
{
    const Reply reply = ask("int_array_size", {array, size});
    if (reply.status == 0) {
        *size = reply.numbers[0];
    }
    return reply.status;
}

aclnnStatus aclSetAclOpExecutorRepeatable(aclOpExecutor *executor)
{
    return ask("set_repeatable", {executor}).status;
}

aclnnStatus aclDestroyAclOpExecutor(aclOpExecutor *executor)
{
    return ask("destroy_executor", {executor}).status;
}

aclnnStatus aclSetInputTensorAddr(aclOpExecutor *executor, const size_t index, aclTensor *tensor, void *addr)
{
    return ask("set_tensor_address", {executor, "input", index, tensor, addr}).status;
}

aclnnStatus aclSetOutputTensorAddr(aclOpExecutor *executor, const size_t index, aclTensor *tensor, void *addr)
{
    return ask("set_tensor_address", {executor, "output", index, tensor, addr}).status;
}
