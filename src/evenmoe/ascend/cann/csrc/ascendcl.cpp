// libascendcl.so: devices, contexts, streams, events, memory.
#pragma GCC visibility push(default)
#include "acl/acl.h"
#pragma GCC visibility pop

#include <cstdlib>

#include "aclnn/opdev/fp16_t.h"

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

aclFloat16 aclFloatToFloat16(float value)
{
    return op::fp16_t(value).val;
}

float aclFloat16ToFloat(aclFloat16 value)
{
    op::fp16_t half;
    half.val = value;
    return half;
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

aclError aclrtCreateStreamWithConfig(aclrtStream *stream, uint32_t, uint32_t)
{
    return aclrtCreateStream(stream);
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

aclError aclrtStreamQuery(aclrtStream stream, aclrtStreamStatus *status)
{
    return give("query_stream", {stream, current_context()}, status);
}

aclError aclrtStreamWaitEvent(aclrtStream stream, aclrtEvent event)
{
    return ask("stream_wait_event", {stream, event, current_context()}).status;
}

aclError aclrtCreateEvent(aclrtEvent *event)
{
    return give("create_event", {current_context()}, event);
}

aclError aclrtCreateEventWithFlag(aclrtEvent *event, uint32_t)
{
    return aclrtCreateEvent(event);
}

aclError aclrtCreateEventExWithFlag(aclrtEvent *event, uint32_t)
{
    return aclrtCreateEvent(event);
}

aclError aclrtDestroyEvent(aclrtEvent event)
{
    return ask("destroy_event", {event}).status;
}

aclError aclrtRecordEvent(aclrtEvent event, aclrtStream stream)
{
    return ask("record_event", {event, stream, current_context()}).status;
}

aclError aclrtResetEvent(aclrtEvent event, aclrtStream stream)
{
    return ask("reset_event", {event, stream, current_context()}).status;
}

aclError aclrtQueryEventStatus(aclrtEvent event, aclrtEventRecordedStatus *status)
{
    return give("query_event", {event}, status);
}

aclError aclrtSynchronizeEvent(aclrtEvent event)
{
    return ask("synchronize_event", {event, -1}).status;
}

aclError aclrtSynchronizeEventWithTimeout(aclrtEvent event, int32_t timeout)
{
    return ask("synchronize_event", {event, timeout}).status;
}

aclError aclrtEventElapsedTime(float *ms, aclrtEvent startEvent, aclrtEvent endEvent)
{
    const Reply reply = ask("elapsed_time", {startEvent, endEvent, static_cast<const void *>(ms)});
    if (reply.status == ACL_SUCCESS) {
        const double milliseconds = std::strtod(reply.text.c_str(), nullptr);  // replies hold whole numbers and texts
        *ms = static_cast<float>(milliseconds);
    }
    return reply.status;
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

aclError aclrtMemsetAsync(void *devPtr, size_t maxCount, int32_t value, size_t count, aclrtStream stream)
{
    return ask("memset_async", {devPtr, maxCount, value, count, stream, current_context()}).status;
}

aclError aclrtGetMemInfo(aclrtMemAttr, size_t *free, size_t *total)
{
    const Reply reply = ask("memory_info", {current_context(), static_cast<const void *>(free),
                                            static_cast<const void *>(total)});
    if (reply.status == ACL_SUCCESS) {
        *free = reply.numbers[0];
        *total = reply.numbers[1];
    }
    return reply.status;
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
