// What outlives what: executors, streams, contexts and groups. `lifetimes PART…`; the last part ends without aclFinalize.
#include <chrono>

#include "support.h"

namespace {

std::string group;
aclrtContext contexts[kEp];
aclrtStream streams[kEp];

void use(int rank)
{
    NEED(aclrtSetCurrentContext(contexts[rank]));
}

void open_devices()
{
    NEED(aclInit(nullptr));
    for (int rank = 0; rank < kEp; rank++) {
        NEED(aclrtCreateContext(&contexts[rank], rank));
        NEED(aclrtCreateStream(&streams[rank]));
    }
    group = open_group();
}

void launch(const Chain &chain, int rank)
{
    use(rank);
    Ready ready = ready_dispatch(chain, group.c_str(), rank);
    NEED(ready.status);
    NEED(aclnnMoeDistributeDispatchV2(ready.workspace, ready.size, ready.executor, streams[rank]));
}


void until_waiting(int rank, const char *words)
{
    const char *message = "";
    while (message != nullptr && std::strstr(message, words) == nullptr) {
        NEED(aclrtSynchronizeStreamWithTimeout(streams[rank], 20) == ACL_ERROR_RT_STREAM_SYNC_TIMEOUT ? 0 : 1);
        message = aclGetRecentErrMsg();
    }
}

// One host thread launches on both ranks, then waits: the second stages return at once.
void in_turn(const Chain &first, const Chain &second)
{
    launch(first, 0);
    launch(second, 1);
    report("rank 0", aclrtSynchronizeStreamWithTimeout(streams[0], kHangMs));
    report("rank 1", aclrtSynchronizeStreamWithTimeout(streams[1], kHangMs));
}

void missing_rank(const Chain &first, const Chain &second)
{
    launch(first, 0);
    until_waiting(0, "waits for rank 1");
    const auto start = std::chrono::steady_clock::now();
    report("alone", aclrtSynchronizeStreamWithTimeout(streams[0], 300));
    const auto waited = std::chrono::steady_clock::now() - start;
    std::printf("waited\t%d\t\n", static_cast<int>(std::chrono::duration_cast<std::chrono::milliseconds>(waited).count()));
    report("looked", aclrtSynchronizeStreamWithTimeout(streams[0], 0));
    launch(second, 1);
    report("rank 0", aclrtSynchronizeStreamWithTimeout(streams[0], kHangMs));
    report("rank 1", aclrtSynchronizeStreamWithTimeout(streams[1], kHangMs));
}

void destroyed_context(const Chain &first, const Chain &second)
{
    void *flag = device_bytes(4, 0);
    const int32_t one = 1;
    launch(first, 0);
    until_waiting(0, "waits for rank 1");
    launch(first, 0);
    NEED(aclrtMemcpyAsync(flag, 4, &one, 4, ACL_MEMCPY_HOST_TO_DEVICE, streams[0]));
    report("destroyed", aclrtDestroyContext(contexts[0]));
    report("its stream", aclrtSynchronizeStream(streams[0]));
    report("its context", aclrtSetCurrentContext(contexts[0]));
    void *data = nullptr;
    report("its thread", aclrtMalloc(&data, 16, ACL_MEM_MALLOC_HUGE_FIRST));
    launch(second, 1);  // rank 0 had begun this one
    report("first call of rank 1", aclrtSynchronizeStreamWithTimeout(streams[1], kHangMs));
    launch(second, 1);  // but not this one
    until_waiting(1, "waits for rank 0");
    report("second call of rank 1", aclrtSynchronizeStreamWithTimeout(streams[1], 500));
    int32_t value = -1;
    NEED(aclrtMemcpy(&value, 4, flag, 4, ACL_MEMCPY_DEVICE_TO_HOST));
    std::printf("queued copy\t%d\t\n", value);
    report("finalize", aclFinalize());
}

void closed_group(const Chain &first, const Chain &)
{
    int32_t devices[kEp] = {0, 1};
    HcclComm comms[kEp];
    NEED(HcclCommInitAll(kEp, devices, comms));
    char name[COMM_NAME_MAX_LENGTH];
    NEED(HcclGetCommName(comms[0], name));
    group = name;
    launch(first, 0);
    NEED(HcclCommDestroy(comms[1]));
    report("peer closed", aclrtSynchronizeStreamWithTimeout(streams[0], kHangMs));
    report("reported once", aclrtSynchronizeStreamWithTimeout(streams[0], kHangMs));
}

void freed_memory(const Chain &first, const Chain &second)
{
    void *counts = device_bytes(kEp * 4, 7);
    Chain moved = first;
    moved.ep_counts = over(counts, {kEp}, ACL_INT32);
    launch(moved, 0);
    NEED(aclrtFree(counts));  // in use: the call keeps it until it is done
    NEED(aclDestroyTensor(moved.ep_counts));
    launch(second, 1);
    report("rank 0", aclrtSynchronizeStreamWithTimeout(streams[0], kHangMs));
    report("rank 1", aclrtSynchronizeStreamWithTimeout(streams[1], kHangMs));
}

void finalize_while_waiting(const Chain &first, const Chain &)
{
    launch(first, 0);
    report("finalize", aclFinalize());
}

void exit_while_waiting(const Chain &first, const Chain &)
{
    launch(first, 0);
    launch(first, 0);
}

void moved_tensors(const Chain &chain, const Chain &)
{
    use(0);
    Ready ready = ready_update(chain);
    NEED(aclSetAclOpExecutorRepeatable(ready.executor));
    void *ids = device_bytes(16), *out = device_bytes(16, 0x55);
    const int32_t swapped[4] = {1, 0, 1, 1};
    NEED(aclrtMemcpy(ids, 16, swapped, 16, ACL_MEMCPY_HOST_TO_DEVICE));
    NEED(aclnnMoeEPLBUpdateExpert(ready.workspace, ready.size, ready.executor, streams[0]));
    NEED(aclrtSynchronizeStream(streams[0]));
    NEED(aclSetInputTensorAddr(ready.executor, 0, chain.ids, ids));
    NEED(aclSetOutputTensorAddr(ready.executor, 0, chain.balanced, out));
    NEED(aclnnMoeEPLBUpdateExpert(ready.workspace, ready.size, ready.executor, nullptr));  // the default stream
    NEED(aclrtSynchronizeStream(nullptr));
    int32_t values[4];
    NEED(aclrtMemcpy(values, 16, out, 16, ACL_MEMCPY_DEVICE_TO_HOST));
    std::printf("moved\t0\t%d %d %d %d\n", values[0], values[1], values[2], values[3]);
    report("destroy", aclDestroyAclOpExecutor(ready.executor));
}

}  // namespace

int main(int argc, char **argv)
{
    struct Part {
        const char *name;
        void (*run)(const Chain &, const Chain &);
    };
    const Part parts[] = {{"in_turn", in_turn}, {"missing_rank", missing_rank}, {"destroyed_context", destroyed_context},
                          {"closed_group", closed_group}, {"freed_memory", freed_memory},
                          {"finalize_while_waiting", finalize_while_waiting},
                          {"exit_while_waiting", exit_while_waiting}, {"moved_tensors", moved_tensors}};
    for (int i = 1; i < argc; i++) {
        open_devices();
        use(0);
        const Chain first;
        use(1);
        const Chain second;
        for (const Part &part : parts) {
            if (std::strcmp(part.name, argv[i]) == 0) {
                part.run(first, second);
                std::printf("%s done\t0\t\n", part.name);
                std::fflush(stdout);
            }
        }
        if (i + 1 < argc) {
            (void)aclFinalize();
        }
    }
    return 0;
}
