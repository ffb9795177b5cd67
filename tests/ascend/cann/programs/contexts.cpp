// V5 of dispatch and combine: contexts made of what HCCL's functions say, copied to the device as the stream goes.
#include "aclnnop/aclnn_moe_distribute_combine_v5.h"
#include "aclnnop/aclnn_moe_distribute_dispatch_v5.h"
#include "hccl/hccl_res.h"
#include "support.h"

namespace {

// As the chip's kernels read it.
struct Context {
    uint32_t rank, ranks_per_server;
    uint64_t kfc;
    uint64_t buffers[1024];
    uint64_t handles[1024];
};

struct Rank {
    aclrtContext context = nullptr;
    aclrtStream stream = nullptr;
    HcclComm comm = nullptr;
    Context host{};
    void *device = nullptr;
    aclTensor *handle = nullptr;
    int64_t buffer_bytes = 0;
    void *y = nullptr;
    Chain chain;
};

void describe(Rank &rank, const char *name)
{
    NEED(HcclCommGetHandleWithName(name, &rank.comm));
    NEED(HcclGetRankId(rank.comm, &rank.host.rank));
    for (uint32_t peer = 0; peer < kEp; peer++) {
        void *address = nullptr;
        uint64_t size = 0;
        NEED(peer == rank.host.rank ? HcclGetHcclBuffer(rank.comm, &address, &size)
                                    : HcclGetRemoteIpcHcclBuf(rank.comm, peer, &address, &size));
        rank.host.buffers[peer] = reinterpret_cast<uint64_t>(address);
        rank.buffer_bytes = static_cast<int64_t>(size);
    }
    std::printf("buffer of rank %u\t0\t%ld\n", rank.host.rank, rank.buffer_bytes);
}

template <class First, class Second>
void launch(const Rank &rank, First first, Second second)
{
    uint64_t size = 0;
    aclOpExecutor *executor = nullptr;
    NEED(first(&size, &executor));
    NEED(second(device_bytes(size), size, executor, rank.stream));
}

aclnnStatus dispatch(const Rank &r, uint64_t *size, aclOpExecutor **executor)
{
    const Chain &c = r.chain;
    return aclnnMoeDistributeDispatchV5GetWorkspaceSize(
        r.handle, c.x, c.ids, nullptr, nullptr, nullptr, nullptr, nullptr, kEp, r.host.rank, kExperts, r.buffer_bytes,
        0, 0, 0, 0, 0, 0, 0, 1, "", 0, 0, 0, c.expand_x, c.scales, c.assist, c.nums, c.ep_counts, nullptr, c.scales,
        size, executor);
}

aclnnStatus combine(const Rank &r, uint64_t *size, aclOpExecutor **executor)
{
    const Chain &c = r.chain;
    return aclnnMoeDistributeCombineV5GetWorkspaceSize(
        r.handle, c.expand_x, c.ids, c.assist, c.ep_counts, c.weights, nullptr, nullptr, nullptr, nullptr, nullptr,
        nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, kEp, r.host.rank, kExperts,
        r.buffer_bytes, 0, 0, 0, 0, 0, 0, 0, 0, 0, "", 0, 0, 0, c.x_out, size, executor);
}

}  // namespace

int main()
{
    NEED(aclInit(nullptr));
    NEED(aclrtSetDevice(0));
    const std::string group = open_group();
    std::vector<Rank> ranks;
    for (int index = 0; index < kEp; index++) {
        aclrtContext context = nullptr;
        NEED(aclrtCreateContext(&context, index));
        ranks.emplace_back();
        Rank &rank = ranks.back();
        rank.context = context;
        NEED(aclrtCreateStream(&rank.stream));
        rank.device = device_bytes(sizeof(Context));
        rank.handle = over(rank.device, {sizeof(Context) / 4}, ACL_INT32);
        rank.y = device_bytes(2 * kTokens * kHidden);
        rank.chain.x_out = over(rank.y, {kTokens, kHidden}, ACL_BF16);
        describe(rank, group.c_str());
        // Behind the first stage, and in the stream's order: the context is read when the call runs.
        NEED(aclrtMemcpyAsync(rank.device, sizeof(Context), &rank.host, sizeof(Context), ACL_MEMCPY_HOST_TO_DEVICE,
                              rank.stream));
        launch(rank, [&](uint64_t *size, aclOpExecutor **e) { return dispatch(rank, size, e); },
               aclnnMoeDistributeDispatchV5);
        launch(rank, [&](uint64_t *size, aclOpExecutor **e) { return combine(rank, size, e); },
               aclnnMoeDistributeCombineV5);
    }
    for (const Rank &rank : ranks) {
        NEED(aclrtSetCurrentContext(rank.context));
        report("chain", aclrtSynchronizeStreamWithTimeout(rank.stream, kHangMs));
        std::vector<uint16_t> y(kTokens * kHidden);
        NEED(aclrtMemcpy(y.data(), y.size() * 2, rank.y, y.size() * 2, ACL_MEMCPY_DEVICE_TO_HOST));
        bool ones = true;
        for (uint16_t value : y) {
            ones = ones && value == 0x3F80;  // 0.5 * 1 + 0.5 * 1
        }
        std::printf("y of rank %u\t%d\t\n", rank.host.rank, ones ? 0 : 1);
    }

    Rank &rank = ranks[0];
    NEED(aclrtSetCurrentContext(rank.context));
    void *address = nullptr;
    uint64_t bytes = 0, size = 0;
    HcclComm found = nullptr;
    aclOpExecutor *executor = nullptr;
    report("no such rank", HcclGetRemoteIpcHcclBuf(rank.comm, kEp, &address, &bytes));
    report("null address", HcclGetHcclBuffer(rank.comm, nullptr, &bytes));
    report("null size", HcclGetHcclBuffer(rank.comm, &address, nullptr));
    report("no such group", HcomGetCommHandleByGroup("nobody", &found));
    report("null name", HcclCommGetHandleWithName(nullptr, &found));
    rank.buffer_bytes = (1 << 20) + 100;
    report("small buffer", dispatch(rank, &size, &executor));
    rank.handle = nullptr;
    report("null context", dispatch(rank, &size, &executor));

    // A context of zeros is none; the other rank is told.
    rank.handle = over(rank.device, {sizeof(Context) / 4}, ACL_INT32);
    rank.buffer_bytes = 0;
    NEED(aclrtMemset(rank.device, sizeof(Context), 0, sizeof(Context)));
    launch(rank, [&](uint64_t *s, aclOpExecutor **e) { return dispatch(rank, s, e); }, aclnnMoeDistributeDispatchV5);
    report("zeros", aclrtSynchronizeStreamWithTimeout(rank.stream, kHangMs));

    // A call that waits for its peer: the end of the group waits for it, and then says that it was not done.
    NEED(aclrtSetCurrentContext(ranks[1].context));
    launch(ranks[1], [&](uint64_t *s, aclOpExecutor **e) { return dispatch(ranks[1], s, e); },
           aclnnMoeDistributeDispatchV5);
    report("waiting", aclrtSynchronizeStreamWithTimeout(ranks[1].stream, 200));
    NEED(aclrtSetCurrentContext(rank.context));
    NEED(aclrtMemcpy(rank.device, sizeof(Context), &rank.host, sizeof(Context), ACL_MEMCPY_HOST_TO_DEVICE));
    launch(rank, [&](uint64_t *s, aclOpExecutor **e) { return dispatch(rank, s, e); }, aclnnMoeDistributeDispatchV5);
    report("destroyed after its calls", HcclCommDestroy(ranks[1].comm));
    report("done", aclrtSynchronizeStreamWithTimeout(rank.stream, kHangMs));
    NEED(aclFinalize());
    return 0;
}
