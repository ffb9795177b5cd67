// libascendcl.so: devices, contexts, streams, memory.
#pragma GCC visibility push(default)
#include "acl/acl.h"
#pragma GCC visibility pop

#include <cstdlib>

#include "core.h"

using evenmoe::ask;
using evenmoe::current_context;
using evenmoe::Reply;
using evenmoe::Value;

namespace {

// Calls that return one handle or number through `out`; it is an error when that is NULL.
template <class T>
aclError give(const char *function, std::vector<Value> arguments, T *out)
{
    arguments.emplace_back(static_cast<const void *>(out));
    const Reply reply = ask(function, arguments);
    if (reply.status == ACL_SUCCESS) {
        if constexpr (std::is_pointer_v<T>) {
            *out = reinterpret_cast<T>(reply.numbers[0]);
        } else {
            *out = static_cast<T>(reply.numbers[0]);
        }
    }
    return reply.status;
}

// Calls after which the thread has another context, which the bridge returns.
aclError enter(const char *function, std::vector<Value> arguments)
{
    arguments.emplace_back(current_context());
    const Reply reply = ask(function, arguments);
    if (reply.status == ACL_SUCCESS) {
        current_context() = reply.numbers[0];
    }
    return reply.status;
}

}  // namespace

aclError aclInit(const char *)
{
    return ask("init", {}).status;
}

aclError aclFinalize(void)
{
    return ask("finalize", {}).status;
}

const char *aclGetRecentErrMsg(void)
{
    return evenmoe::take_message();
}

size_t aclDataTypeSize(aclDataType dataType)
{
    const Reply reply = ask("data_type_size", {dataType});
    return reply.status == 0 ? reply.numbers[0] : 0;
}

aclError aclrtGetDeviceCount(uint32_t *count)
{
    return give("device_count", {}, count);
}

aclError aclrtSetDevice(int32_t deviceId)
{
    return enter("set_device", {deviceId});
}

aclError aclrtGetDevice(int32_t *deviceId)
{
    return give("get_device", {current_context()}, deviceId);
}

aclError aclrtResetDevice(int32_t deviceId)
{
    return enter("reset_device", {deviceId});
}

const char *aclrtGetSocName(void)
{
    return "Ascend910_9391";
}

aclError aclrtCreateContext(aclrtContext *context, int32_t deviceId)
{
    const aclError status = give("create_context", {deviceId}, context);
    if (status == ACL_SUCCESS) {
        current_context() = reinterpret_cast<uint64_t>(*context);
    }
    return status;
}

aclError aclrtDestroyContext(aclrtContext context)
{
    return enter("destroy_context", {context});
}

aclError aclrtSetCurrentContext(aclrtContext context)
{
    return enter("set_current_context", {context});
}

aclError aclrtGetCurrentContext(aclrtContext *context)
{
    return give("get_current_context", {current_context()}, context);
}

aclError aclrtCreateStream(aclrtStream *stream)
{
    return give("create_stream", {current_context()}, stream);
}

aclError aclrtDestroyStream(aclrtStream stream)
{
    return ask("destroy_stream", {stream, 0}).status;
}

aclError aclrtDestroyStreamForce(aclrtStream stream)
{
    return ask("destroy_stream", {stream, 1}).status;
}

aclError aclrtSynchronizeStream(aclrtStream stream)
{
    return ask("synchronize_stream", {stream, -1, current_context()}).status;
}

aclError aclrtSynchronizeStreamWithTimeout(aclrtStream stream, int32_t timeout)
{
    return ask("synchronize_stream", {stream, timeout, current_context()}).status;
}

aclError aclrtSynchronizeDevice(void)
{
    return ask("synchronize_device", {current_context()}).status;
}

aclError aclrtMalloc(void **devPtr, size_t size, aclrtMemMallocPolicy)
{
    return give("malloc", {current_context(), size}, devPtr);
}

aclError aclrtFree(void *devPtr)
{
    return ask("free", {devPtr}).status;
}

aclError aclrtMallocHost(void **hostPtr, size_t size)
{
    return give("malloc_host", {size}, hostPtr);
}

aclError aclrtFreeHost(void *hostPtr)
{
    return ask("free_host", {hostPtr}).status;
}

aclError aclrtMemset(void *devPtr, size_t maxCount, int32_t value, size_t count)
{
    return ask("memset", {devPtr, maxCount, value, count}).status;
}

aclError aclrtMemcpy(void *dst, size_t destMax, const void *src, size_t count, aclrtMemcpyKind kind)
{
    return ask("memcpy", {dst, destMax, src, count, kind}).status;
}

aclError aclrtMemcpyAsync(
    void *dst, size_t destMax, const void *src, size_t count, aclrtMemcpyKind kind, aclrtStream stream)
{
    return ask("memcpy_async", {dst, destMax, src, count, kind, stream, current_context()}).status;
}
