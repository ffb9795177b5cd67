// Every call here is wrong in one way; each prints its label, the status and the message.
#include "support.h"

namespace {

int update(const aclTensor *ids, const aclTensor *table, int64_t rank, int64_t world, int64_t mode, aclTensor *out)
{
    uint64_t size = 0;
    aclOpExecutor *executor = nullptr;
    return aclnnMoeEPLBUpdateExpertGetWorkspaceSize(ids, table, rank, world, mode, out, &size, &executor);
}

void before_init()
{
    uint32_t count = 0;
    report("before init", aclrtGetDeviceCount(&count));
    int32_t device = 0;
    HcclComm comm;
    report("group before init", HcclCommInitAll(1, &device, &comm));
}

void runtime_calls()
{
    void *data = nullptr;
    report("init twice", aclInit(nullptr));
    report("malloc without context", aclrtMalloc(&data, 16, ACL_MEM_MALLOC_HUGE_FIRST));
    aclrtStream stream = nullptr;
    report("stream without context", aclrtCreateStream(&stream));
    report("device 16", aclrtSetDevice(16));
    report("device -1", aclrtSetDevice(-1));
    NEED(aclrtSetDevice(0));
    report("malloc null", aclrtMalloc(nullptr, 16, ACL_MEM_MALLOC_HUGE_FIRST));
    report("malloc 0", aclrtMalloc(&data, 0, ACL_MEM_MALLOC_HUGE_FIRST));
    report("malloc too much", aclrtMalloc(&data, SIZE_MAX, ACL_MEM_MALLOC_HUGE_FIRST));
    NEED(aclrtMalloc(&data, 16, ACL_MEM_MALLOC_HUGE_FIRST));
    char host[64] = {0};
    report("copy beyond destMax", aclrtMemcpy(data, 16, host, 17, ACL_MEMCPY_HOST_TO_DEVICE));
    report("copy beyond allocation", aclrtMemcpy(data, 64, host, 17, ACL_MEMCPY_HOST_TO_DEVICE));
    report("copy from freed or foreign", aclrtMemcpy(host, 64, host + 8, 8, ACL_MEMCPY_DEVICE_TO_HOST));
    report("copy with the wrong kind", aclrtMemcpy(data, 16, host, 16, ACL_MEMCPY_DEVICE_TO_HOST));
    report("copy null", aclrtMemcpy(nullptr, 16, host, 16, ACL_MEMCPY_HOST_TO_DEVICE));
    report("copy kind 9", aclrtMemcpy(data, 16, host, 16, static_cast<aclrtMemcpyKind>(9)));
    report("set beyond allocation", aclrtMemset(data, 17, 0, 17));
    NEED(aclrtFree(data));
    report("free twice", aclrtFree(data));
    report("free inside host memory", aclrtFree(host));
    aclrtContext context = nullptr;
    NEED(aclrtGetCurrentContext(&context));
    NEED(aclrtCreateStream(&stream));
    report("context as stream", aclrtSynchronizeStream(context));
    report("stack address as stream", aclrtSynchronizeStream(host));
    report("timeout -2", aclrtSynchronizeStreamWithTimeout(stream, -2));
    NEED(aclrtDestroyStream(stream));
    report("stream destroyed", aclrtSynchronizeStream(stream));
    report("stream destroyed twice", aclrtDestroyStream(stream));
    report("context foreign", aclrtSetCurrentContext(host));
    report("context null", aclrtDestroyContext(nullptr));
}

void groups()
{
    int32_t devices[2] = {0, 0};
    HcclComm comms[2];
    report("group without devices", HcclCommInitAll(2, nullptr, comms));
    report("group without comms", HcclCommInitAll(2, devices, nullptr));
    report("group with one device twice", HcclCommInitAll(2, devices, comms));
    report("group of 0", HcclCommInitAll(0, devices, comms));
    report("group of 4 billion", HcclCommInitAll(UINT32_MAX, devices, comms));
    devices[1] = 99;
    report("group with device 99", HcclCommInitAll(2, devices, comms));
    devices[1] = 1;
    NEED(HcclCommInitAll(2, devices, comms));
    report("name null", HcclGetCommName(comms[0], nullptr));
    NEED(HcclCommDestroy(comms[0]));
    char name[COMM_NAME_MAX_LENGTH];
    report("name of a destroyed comm", HcclGetCommName(comms[0], name));
    report("comm null", HcclCommDestroy(nullptr));
}

void tensors(const Chain &c)
{
    int64_t dims[2] = {2, -2}, strides[2] = {2, -1};
    report("tensor dims negative", over(nullptr, {2, -2}, ACL_INT32) == nullptr ? 1 : 0);
    dims[1] = 2;
    report("tensor strides negative", over(nullptr, {2, 2}, ACL_INT32, strides) == nullptr ? 1 : 0);
    report("tensor offset negative", over(nullptr, {2, 2}, ACL_INT32, nullptr, -1) == nullptr ? 1 : 0);
    report("tensor dims null", aclCreateTensor(nullptr, 2, ACL_INT32, nullptr, 0, ACL_FORMAT_ND, dims, 2, nullptr) == nullptr);
    report("tensor dims many",
           aclCreateTensor(dims, UINT64_MAX, ACL_INT32, nullptr, 0, ACL_FORMAT_ND, dims, 2, nullptr) == nullptr);
    report("destroy tensor null", aclDestroyTensor(nullptr));
    aclTensor *gone = tensor({2, 2}, ACL_INT32);
    NEED(aclDestroyTensor(gone));
    report("destroy tensor twice", aclDestroyTensor(gone));
    report("ids destroyed", update(gone, c.table, 0, 2, 0, c.balanced));
    report("ids foreign", update(reinterpret_cast<aclTensor *>(dims), c.table, 0, 2, 0, c.balanced));
    report("ids at null", update(over(nullptr, {2, 2}, ACL_INT32), c.table, 0, 2, 0, c.balanced));
    report("ids on the host", update(over(dims, {2, 2}, ACL_INT32), c.table, 0, 2, 0, c.balanced));
    void *small = device_bytes(12);
    report("ids in 12 bytes", update(over(small, {2, 2}, ACL_INT32), c.table, 0, 2, 0, c.balanced));
    char *odd = static_cast<char *>(device_bytes(64)) + 1;
    report("ids unaligned", update(over(odd, {2, 2}, ACL_INT32), c.table, 0, 2, 0, c.balanced));
    report("ids NZ", update(over(odd - 1, {2, 2}, ACL_INT32, nullptr, 0, ACL_FORMAT_FRACTAL_NZ), c.table, 0, 2, 0, c.balanced));
    report("ids of strings", update(over(odd - 1, {2, 2}, ACL_STRING), c.table, 0, 2, 0, c.balanced));
    report("ids huge", update(over(odd - 1, {INT64_MAX, INT64_MAX}, ACL_INT32), c.table, 0, 2, 0, c.balanced));
    report("ids 2^40 rows", update(over(odd - 1, {1LL << 40, 2}, ACL_INT32), c.table, 0, 2, 0, c.balanced));
    const int64_t flat[2] = {0, 1};
    report("out overlaps", update(c.ids, c.table, 0, 2, 0, over(odd - 1, {2, 2}, ACL_INT32, flat)));
}

void operators(const Chain &c, const char *group)
{
    uint64_t size = 0;
    aclOpExecutor *executor = nullptr;
    report("ids null", update(nullptr, c.table, 0, 2, 0, c.balanced));
    report("out null", update(c.ids, c.table, 0, 2, 0, nullptr));
    report("ids of floats", update(c.weights, c.table, 0, 2, 0, c.balanced));
    report("ids 513 rows", update(tensor({513, 2}, ACL_INT32), c.table, 0, 2, 0, tensor({513, 2}, ACL_INT32)));
    report("world of 1", update(c.ids, c.table, 0, 1, 0, c.balanced));
    report("rank 2 of 2", update(c.ids, c.table, 2, 2, 0, c.balanced));
    report("rank least", update(c.ids, c.table, INT64_MIN, 2, 0, c.balanced));
    report("mode 1 of the old operator", update(c.ids, c.table, 0, 2, 1, c.balanced));
    report("size null", aclnnMoeEPLBUpdateExpertGetWorkspaceSize(c.ids, c.table, 0, 2, 0, c.balanced, nullptr, &executor));
    report("executor null", aclnnMoeEPLBUpdateExpertGetWorkspaceSize(c.ids, c.table, 0, 2, 0, c.balanced, &size, nullptr));
    report("mask null", aclnnMoeUpdateExpertGetWorkspaceSize(
        c.ids, c.table, nullptr, nullptr, nullptr, 0, 2, 0, c.balanced, nullptr, &size, &executor));
    report("scales without threshold", aclnnMoeUpdateExpertGetWorkspaceSize(
        c.ids, c.table, c.weights, nullptr, nullptr, 0, 2, 0, c.balanced, c.mask, &size, &executor));

    const auto dispatch = [&](const aclTensor *x, const aclTensor *scales, const char *ep, int64_t quant, aclTensor *out) {
        return aclnnMoeDistributeDispatchV2GetWorkspaceSize(
            x, c.ids, scales, nullptr, nullptr, ep, kEp, 0, kExperts, "", 0, 0, 0, 0, 0, quant, 0, 1, nullptr, out,
            c.scales, c.assist, c.nums, c.ep_counts, c.tp_counts, c.scales, &size, &executor);
    };
    const std::string longest(127, 'g'), too_long(128, 'g');
    report("dispatch x null", dispatch(nullptr, nullptr, group, 0, c.expand_x));
    report("dispatch out null", dispatch(c.x, nullptr, group, 0, nullptr));
    report("dispatch x of ints", dispatch(c.ids, nullptr, group, 0, c.expand_x));
    report("dispatch group null", dispatch(c.x, nullptr, nullptr, 0, c.expand_x));
    report("dispatch group of 128", dispatch(c.x, nullptr, too_long.c_str(), 0, c.expand_x));
    report("dispatch group unknown", dispatch(c.x, nullptr, longest.c_str(), 0, c.expand_x));
    report("dispatch quantMode 7", dispatch(c.x, nullptr, group, 7, c.expand_x));
    report("dispatch scales without quant", dispatch(c.x, c.weights, group, 0, c.expand_x));
    report("dispatch out too short", dispatch(c.x, nullptr, group, 0, tensor({kRows - 1, kHidden}, ACL_BF16)));

    const auto combine = [&](const char *ep, const aclTensor *counts, const aclTensor *reserved, aclTensor *out) {
        return aclnnMoeDistributeCombineV2GetWorkspaceSize(
            c.expand_x, c.ids, c.assist, c.ep_counts, c.weights, counts, nullptr, reserved, nullptr, nullptr, nullptr,
            nullptr, ep, kEp, 0, kExperts, "", 0, 0, 0, 0, 0, 0, 0, 0, 0, nullptr, out, &size, &executor);
    };
    report("combine group of 128", combine(too_long.c_str(), c.tp_counts, nullptr, c.x_out));
    report("combine out null", combine(group, c.tp_counts, nullptr, nullptr));
    report("combine without tpSendCounts", combine(group, nullptr, nullptr, c.x_out));
    report("combine reserved given", combine(group, c.tp_counts, c.weights, c.x_out));
    report("norm gamma null", aclnnMoeDistributeCombineAddRmsNormGetWorkspaceSize(
        c.expand_x, c.ids, c.assist, c.ep_counts, c.weights, c.residual, nullptr, c.tp_counts, nullptr, nullptr, nullptr,
        nullptr, nullptr, nullptr, group, kEp, 0, kExperts, "", 0, 0, 0, 0, 0, 0, 0, 0, 0, nullptr, 1e-6f, c.y, c.rstd,
        c.x_out_norm, &size, &executor));
}

void second_stages(const Chain &c, const char *group)
{
    aclrtStream stream = nullptr, gone = nullptr, other = nullptr;
    NEED(aclrtCreateStream(&stream));
    NEED(aclrtCreateStream(&gone));
    NEED(aclrtDestroyStream(gone));
    Ready ready = ready_update(c);
    NEED(ready.status);
    char host[16];
    report("second executor null", aclnnMoeEPLBUpdateExpert(ready.workspace, ready.size, nullptr, stream));
    report("second executor foreign", aclnnMoeEPLBUpdateExpert(
        ready.workspace, ready.size, reinterpret_cast<aclOpExecutor *>(host), stream));
    report("second of another operator", aclnnMoeUpdateExpert(ready.workspace, ready.size, ready.executor, stream));
    report("second workspace null", aclnnMoeEPLBUpdateExpert(nullptr, ready.size, ready.executor, stream));
    report("second workspace small", aclnnMoeEPLBUpdateExpert(ready.workspace, 1, ready.executor, stream));
    report("second workspace smaller than said", aclnnMoeEPLBUpdateExpert(
        device_bytes(64), ready.size, ready.executor, stream));
    report("second workspace on the host", aclnnMoeEPLBUpdateExpert(host, ready.size, ready.executor, stream));
    report("second stream destroyed", aclnnMoeEPLBUpdateExpert(ready.workspace, ready.size, ready.executor, gone));
    report("second at last", aclnnMoeEPLBUpdateExpert(ready.workspace, ready.size, ready.executor, stream));
    report("second twice", aclnnMoeEPLBUpdateExpert(ready.workspace, ready.size, ready.executor, stream));
    report("repeatable too late", aclSetAclOpExecutorRepeatable(ready.executor));
    report("synchronized", aclrtSynchronizeStream(stream));

    report("repeatable null", aclSetAclOpExecutorRepeatable(nullptr));
    report("destroy executor null", aclDestroyAclOpExecutor(nullptr));
    ready = ready_update(c);
    report("move before repeatable", aclSetInputTensorAddr(ready.executor, 0, c.ids, device_bytes(16)));
    report("repeatable", aclSetAclOpExecutorRepeatable(ready.executor));
    report("move index 2 of 2", aclSetInputTensorAddr(ready.executor, 2, c.ids, device_bytes(16)));
    report("move null tensor", aclSetInputTensorAddr(ready.executor, 0, nullptr, device_bytes(16)));
    report("move another shape", aclSetInputTensorAddr(ready.executor, 0, c.weights, device_bytes(16)));
    report("move to the host", aclSetInputTensorAddr(ready.executor, 0, c.ids, host));
    report("first time", aclnnMoeEPLBUpdateExpert(ready.workspace, ready.size, ready.executor, stream));
    report("second time", aclnnMoeEPLBUpdateExpert(ready.workspace, ready.size, ready.executor, stream));
    report("destroy executor", aclDestroyAclOpExecutor(ready.executor));
    report("destroy executor twice", aclDestroyAclOpExecutor(ready.executor));
    report("third time", aclnnMoeEPLBUpdateExpert(ready.workspace, ready.size, ready.executor, stream));
    report("synchronized again", aclrtSynchronizeStream(stream));

    Ready dispatch = ready_dispatch(c, group, 0);
    NEED(dispatch.status);
    NEED(aclrtSetDevice(1));
    NEED(aclrtCreateStream(&other));
    report("second on another device", aclnnMoeDistributeDispatchV2(
        dispatch.workspace, dispatch.size, dispatch.executor, other));
}

}  // namespace

int main()
{
    before_init();
    NEED(aclInit(nullptr));
    runtime_calls();
    groups();
    const std::string group = open_group();
    const Chain chain;
    tensors(chain);
    operators(chain, group.c_str());
    second_stages(chain, group.c_str());
    report("finalize", aclFinalize());
    std::printf("done\n");
    return 0;
}
