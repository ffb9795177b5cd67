// Events, queries of streams, asynchronous fills, memory figures, arrays of numbers, half precision.
#include "support.h"

int main()
{
    NEED(aclInit(nullptr));
    NEED(aclrtSetDevice(0));
    aclrtStream stream = nullptr, other = nullptr;
    NEED(aclrtCreateStreamWithConfig(&stream, 0, ACL_STREAM_FAST_LAUNCH | ACL_STREAM_FAST_SYNC));
    NEED(aclrtCreateStream(&other));
    aclrtEvent start = nullptr, end = nullptr;
    NEED(aclrtCreateEvent(&start));
    NEED(aclrtCreateEventWithFlag(&end, ACL_EVENT_SYNC | ACL_EVENT_TIME_LINE));
    aclrtEventRecordedStatus recorded = ACL_EVENT_RECORDED_STATUS_COMPLETE;
    NEED(aclrtQueryEventStatus(start, &recorded));
    report("never recorded", recorded == ACL_EVENT_RECORDED_STATUS_NOT_READY ? 0 : 1);
    float ms = -1;
    report("time of no record", aclrtEventElapsedTime(&ms, start, end));

    size_t before = 0, after = 0, total = 0;
    NEED(aclrtGetMemInfo(ACL_HBM_MEM, &before, &total));
    char *data = static_cast<char *>(device_bytes(64));
    NEED(aclrtGetMemInfo(ACL_HBM_MEM, &after, &total));
    report("bytes less", static_cast<int>(before - after));
    report("gigabytes of all", static_cast<int>(total >> 30));

    NEED(aclrtRecordEvent(start, stream));
    NEED(aclrtMemsetAsync(data, 64, 7, 64, stream));
    NEED(aclrtRecordEvent(end, stream));
    NEED(aclrtStreamWaitEvent(other, end));
    char copied[64] = {0};
    NEED(aclrtMemcpyAsync(copied, 64, data, 64, ACL_MEMCPY_DEVICE_TO_HOST, other));
    NEED(aclrtSynchronizeStreamWithTimeout(other, kHangMs));
    report("copied behind the event", copied[0] == 7 && copied[63] == 7 ? 0 : 1);
    NEED(aclrtSynchronizeEventWithTimeout(end, kHangMs));
    NEED(aclrtSynchronizeEvent(start));
    NEED(aclrtQueryEventStatus(end, &recorded));
    report("complete", recorded == ACL_EVENT_RECORDED_STATUS_COMPLETE ? 0 : 1);
    NEED(aclrtEventElapsedTime(&ms, start, end));
    report("time", ms > 0 ? 0 : 1);
    aclrtStreamStatus status = ACL_STREAM_STATUS_NOT_READY;
    NEED(aclrtSynchronizeStream(stream));
    NEED(aclrtStreamQuery(stream, &status));
    report("stream", status == ACL_STREAM_STATUS_COMPLETE ? 0 : 1);
    NEED(aclrtResetEvent(end, stream));
    NEED(aclrtSynchronizeStream(stream));
    NEED(aclrtQueryEventStatus(end, &recorded));
    report("reset", recorded == ACL_EVENT_RECORDED_STATUS_NOT_READY ? 0 : 1);
    NEED(aclrtDestroyEvent(end));
    report("destroyed", aclrtRecordEvent(end, stream));
    report("time -2", aclrtSynchronizeEventWithTimeout(start, -2));
    report("fill beyond", aclrtMemsetAsync(data, 65, 7, 65, stream));
    report("free null", aclrtGetMemInfo(ACL_HBM_MEM, nullptr, &total));

    const int64_t numbers[3] = {3, 1, 2};
    aclIntArray *array = aclCreateIntArray(numbers, 3);
    uint64_t size = 0;
    NEED(aclGetIntArraySize(array, &size));
    report("numbers", static_cast<int>(size));
    NEED(aclDestroyIntArray(array));
    report("array destroyed", aclGetIntArraySize(array, &size));
    report("array null", aclCreateIntArray(nullptr, 3) == nullptr ? 1 : 0);
    report("empty array", aclCreateIntArray(nullptr, 0) == nullptr ? 1 : 0);
    report("half", aclFloatToFloat16(1.5f) == 0x3E00 && aclFloat16ToFloat(0x3E00) == 1.5f ? 0 : 1);

    HcclCommConfig config{};
    HcclComm comm = nullptr;
    HcclRootInfo info{};
    report("config", HcclCommInitRootInfoConfig(1, &info, 0, &config, &comm));
    report("config null", HcclCommInitRootInfoConfig(1, &info, 0, nullptr, &comm));
    report("root info", HcclCommInitRootInfo(1, &info, 0, &comm));
    report("root info null", HcclCommInitRootInfo(1, nullptr, 0, &comm));
    report("table", HcclCommInitClusterInfo("not there.json", 0, &comm));
    std::printf("words\t%d\t%s\n", 0, HcclGetErrorString(HCCL_E_TIMEOUT));
    NEED(aclFinalize());
    return 0;
}
