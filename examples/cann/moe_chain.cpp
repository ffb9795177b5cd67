// The chain update expert -> dispatch -> combine + add + RMS norm on 16 devices, with values that can be checked by hand.
//
// 8 expert-parallel ranks times 2 tensor-parallel ranks; 8 tokens of ones per rank, each for experts 0, 1 and 2 with
// weight 0.1. The experts return what they get, and the tensor-parallel peers' rows are summed, so a token comes back as
// 3 * 0.1 * 2 = 0.6; the shared expert's output and the residual add 1 each: x = 2.6, which is 2.59375 in bf16.
// 1 / rms(x) = 1 / 2.6 = 0.3846, and y = x / rms(x) * gamma = 1.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "acl/acl.h"
#include "aclnnop/aclnn_moe_distribute_combine_add_rms_norm.h"
#include "aclnnop/aclnn_moe_distribute_dispatch_v2.h"
#include "aclnnop/aclnn_moe_eplb_update_expert.h"
#include "hccl/hccl.h"

namespace {

constexpr int64_t kEp = 8, kTp = 2, kTokens = 8, kHidden = 7168, kTopK = 3, kExperts = 8;
constexpr int64_t kRows = kTokens * kEp;  // rows that one expert may get from its group
constexpr uint16_t kOne = 0x3F80;         // 1.0 in bf16
constexpr int32_t kTimeoutMs = 60000;

void check(int status, const char *call)
{
    if (status != 0) {
        const char *message = aclGetRecentErrMsg();
        std::printf("%s returned %d: %s\n", call, status, message == nullptr ? "" : message);
        std::fflush(stdout);
        std::_Exit(1);  // other devices' threads may be here, too, and std::exit is for one of them only
    }
}
#define CHECK(call) check(call, #call)

float widen(uint16_t bf16)
{
    const uint32_t bits = static_cast<uint32_t>(bf16) << 16;
    float value;
    static_assert(sizeof value == sizeof bits, "float is 32 bits");
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

// A contiguous tensor on the current device, filled with the values given.
template <class T>
class DeviceTensor {
public:
    DeviceTensor(const std::vector<int64_t> &shape, aclDataType type, const std::vector<T> &values) : size_(values.size())
    {
        const size_t bytes = size_ * sizeof(T);
        CHECK(aclrtMalloc(&data_, bytes, ACL_MEM_MALLOC_HUGE_FIRST));
        CHECK(aclrtMemcpy(data_, bytes, values.data(), bytes, ACL_MEMCPY_HOST_TO_DEVICE));
        handle_ = aclCreateTensor(shape.data(), shape.size(), type, nullptr, 0, ACL_FORMAT_ND, shape.data(),
                                  shape.size(), data_);
        check(handle_ == nullptr, "aclCreateTensor");
    }
    DeviceTensor(const std::vector<int64_t> &shape, aclDataType type, T value)
        : DeviceTensor(shape, type, std::vector<T>(count(shape), value))
    {
    }
    ~DeviceTensor()
    {
        aclDestroyTensor(handle_);
        aclrtFree(data_);
    }
    DeviceTensor(const DeviceTensor &) = delete;
    DeviceTensor &operator=(const DeviceTensor &) = delete;

    operator aclTensor *() const { return handle_; }

    std::vector<T> read() const
    {
        std::vector<T> values(size_);
        const size_t bytes = size_ * sizeof(T);
        CHECK(aclrtMemcpy(values.data(), bytes, data_, bytes, ACL_MEMCPY_DEVICE_TO_HOST));
        return values;
    }

private:
    static size_t count(const std::vector<int64_t> &shape)
    {
        size_t product = 1;
        for (int64_t size : shape) {
            product *= static_cast<size_t>(size);
        }
        return product;
    }

    size_t size_;
    void *data_ = nullptr;
    aclTensor *handle_ = nullptr;
};

// The second stage, on a stream, and its end. The workspace lives until then.
template <class SecondStage>
void run(SecondStage second_stage, uint64_t workspace_size, aclOpExecutor *executor, aclrtStream stream)
{
    void *workspace = nullptr;
    if (workspace_size > 0) {
        CHECK(aclrtMalloc(&workspace, workspace_size, ACL_MEM_MALLOC_HUGE_FIRST));
    }
    CHECK(second_stage(workspace, workspace_size, executor, stream));
    CHECK(aclrtSynchronizeStreamWithTimeout(stream, kTimeoutMs));
    if (workspace != nullptr) {
        CHECK(aclrtFree(workspace));
    }
}

bool near(const char *what, int64_t device, float value, float expected, float tolerance)
{
    const bool good = std::fabs(value - expected) <= tolerance;
    if (!good) {
        std::printf("device %d: %s is %.7g, not %.7g\n", static_cast<int>(device), what, value, expected);
    }
    return good;
}

bool run_device(int64_t device, HcclComm ep, HcclComm tp)
{
    const int64_t ep_rank = device / kTp, tp_rank = device % kTp;
    aclrtStream stream = nullptr;
    CHECK(aclrtSetDevice(static_cast<int32_t>(device)));
    CHECK(aclrtCreateStream(&stream));
    char ep_name[COMM_NAME_MAX_LENGTH], tp_name[COMM_NAME_MAX_LENGTH];
    CHECK(HcclGetCommName(ep, ep_name));
    CHECK(HcclGetCommName(tp, tp_name));

    std::vector<int32_t> ids, table;
    for (int32_t token = 0; token < kTokens; token++) {
        ids.insert(ids.end(), {0, 1, 2});
    }
    for (int32_t expert = 0; expert < kExperts; expert++) {
        table.insert(table.end(), {1, expert});  // one replica: the expert itself
    }
    const DeviceTensor<int32_t> expert_ids({kTokens, kTopK}, ACL_INT32, ids), eplb_table({kExperts, 2}, ACL_INT32, table);
    const DeviceTensor<int32_t> balanced_ids({kTokens, kTopK}, ACL_INT32, -1);
    const DeviceTensor<uint16_t> x({kTokens, kHidden}, ACL_BF16, kOne), gamma({kHidden}, ACL_BF16, kOne);
    const DeviceTensor<uint16_t> residual({kTokens, 1, kHidden}, ACL_BF16, kOne);
    const DeviceTensor<uint16_t> shared({kTokens, 1, kHidden}, ACL_BF16, kOne);
    const DeviceTensor<float> weights({kTokens, kTopK}, ACL_FLOAT, 0.1f);
    const DeviceTensor<uint16_t> expand_x({kTp * kRows, kHidden}, ACL_BF16, uint16_t{0});
    const DeviceTensor<float> dynamic_scales({kTp * kRows}, ACL_FLOAT, 0.f), expand_scales({kRows}, ACL_FLOAT, 0.f);
    const DeviceTensor<int32_t> assist({128 * kRows}, ACL_INT32, 0), ep_counts({kTp * kEp}, ACL_INT32, 0);
    const DeviceTensor<int32_t> tp_counts({kTp}, ACL_INT32, 0);
    const DeviceTensor<int64_t> token_nums({1}, ACL_INT64, int64_t{0});
    const DeviceTensor<uint16_t> y({kTokens, 1, kHidden}, ACL_BF16, uint16_t{0});
    const DeviceTensor<uint16_t> x_out({kTokens, 1, kHidden}, ACL_BF16, uint16_t{0});
    const DeviceTensor<float> rstd({kTokens, 1, 1}, ACL_FLOAT, 0.f);

    uint64_t size = 0;
    aclOpExecutor *executor = nullptr;
    CHECK(aclnnMoeEPLBUpdateExpertGetWorkspaceSize(expert_ids, eplb_table, ep_rank, kEp, 0, balanced_ids, &size, &executor));
    run(aclnnMoeEPLBUpdateExpert, size, executor, stream);

    CHECK(aclnnMoeDistributeDispatchV2GetWorkspaceSize(
        x, balanced_ids, nullptr, nullptr, weights, ep_name, kEp, ep_rank, kExperts, tp_name, kTp, tp_rank, 0, 0, 0, 0,
        kRows, 1, "", expand_x, dynamic_scales, assist, token_nums, ep_counts, tp_counts, expand_scales, &size,
        &executor));
    run(aclnnMoeDistributeDispatchV2, size, executor, stream);

    CHECK(aclnnMoeDistributeCombineAddRmsNormGetWorkspaceSize(
        expand_x, balanced_ids, assist, ep_counts, weights, residual, gamma, tp_counts, nullptr, nullptr, nullptr,
        nullptr, nullptr, shared, ep_name, kEp, ep_rank, kExperts, tp_name, kTp, tp_rank, 0, 0, 0, kRows, 0, 0, 0, "",
        1e-6f, y, rstd, x_out, &size, &executor));
    run(aclnnMoeDistributeCombineAddRmsNorm, size, executor, stream);

    bool good = balanced_ids.read() == ids;
    // Experts 0, 1 and 2 get every token of their group, and the peer's; the others none.
    good = near("expertTokenNums", device, static_cast<float>(token_nums.read()[0]), ep_rank < kTopK ? 2 * kRows : 0, 0) && good;
    for (uint16_t value : x_out.read()) {
        good = good && near("xOut", device, widen(value), 2.59375f, 0);
    }
    for (float value : rstd.read()) {
        // A sum of 7168 in a tree of 13 levels, halved by the root, and 4 more roundings: 11 * 2^-24 of 0.38.
        good = good && near("rstdOut", device, value, 1 / std::sqrt(2.6f * 2.6f + 1e-6f), 2.6e-7f);
    }
    for (uint16_t value : y.read()) {
        good = good && near("yOut", device, widen(value), 1, 0);
    }
    CHECK(aclrtDestroyStream(stream));
    return good;
}

}  // namespace

int main()
{
    CHECK(aclInit(nullptr));
    HcclComm ep[kTp][kEp], tp[kEp][kTp];
    for (int32_t t = 0; t < kTp; t++) {
        int32_t devices[kEp];
        for (int32_t e = 0; e < kEp; e++) {
            devices[e] = e * kTp + t;
        }
        CHECK(HcclCommInitAll(kEp, devices, ep[t]));
    }
    for (int32_t e = 0; e < kEp; e++) {
        int32_t devices[kTp] = {e * static_cast<int32_t>(kTp), e * static_cast<int32_t>(kTp) + 1};
        CHECK(HcclCommInitAll(kTp, devices, tp[e]));
    }
    std::vector<std::thread> threads;
    std::vector<char> good(kEp * kTp, 0);
    for (int64_t device = 0; device < kEp * kTp; device++) {
        const int64_t e = device / kTp, t = device % kTp;
        threads.emplace_back([&good, &ep, &tp, device, e, t] { good[device] = run_device(device, ep[t][e], tp[e][t]); });
    }
    int wrong = 0;
    for (size_t device = 0; device < threads.size(); device++) {
        threads[device].join();
        wrong += good[device] ? 0 : 1;
    }
    CHECK(aclFinalize());
    std::printf("%d of %zu devices: xOut 2.59375, yOut 1, rstdOut 0.3846\n", static_cast<int>(good.size()) - wrong, good.size());
    return wrong == 0 ? 0 : 1;
}
