// Every later version of the operators to its end on two ranks, with virtual experts, and what comes out.
#include "aclnn/opdev/fp16_t.h"
#include "support.h"

namespace {

constexpr int64_t kIds = 5;  // experts 0 and 1, then one zero, one copy and one const expert

std::vector<uint16_t> halves(const std::vector<int64_t> &shape, float value)
{
    return std::vector<uint16_t>(count(shape), op::fp16_t(value).val);
}

aclTensor *of_halves(const Shape &shape, float value)
{
    return tensor_of<uint16_t>(shape, ACL_FLOAT16, halves(shape, value));
}

uint16_t bf16(float value)
{
    uint32_t bits = 0;
    std::memcpy(&bits, &value, sizeof bits);
    return static_cast<uint16_t>(bits >> 16);  // for values that bf16 has
}

aclTensor *of_bf16(const Shape &shape, float value)
{
    return tensor_of<uint16_t>(shape, ACL_BF16, std::vector<uint16_t>(count(shape), bf16(value)));
}

struct Output {
    void *data;
    aclTensor *handle;

    Output(const Shape &shape, aclDataType type) : data(device_bytes(count(shape) * aclDataTypeSize(type), 0x11))
    {
        handle = over(data, shape, type);
    }
};

// Every token goes to all five experts with weight 0.5; x and the two constants differ between the versions.
struct Rank {
    aclrtContext context = nullptr;
    aclrtStream stream = nullptr;
    aclTensor *ids = tensor_of<int32_t>({kTokens, kIds}, ACL_INT32, {0, 1, 2, 3, 4, 0, 1, 2, 3, 4});
    aclTensor *weights = tensor_of<float>({kTokens, kIds}, ACL_FLOAT, std::vector<float>(kTokens * kIds, 0.5f));
    aclTensor *expand_scales = tensor({kRows}, ACL_FLOAT);
    aclTensor *assist = tensor({128 * kRows}, ACL_INT32);
    Output nums{{1}, ACL_INT64};
    Output ep_counts{{kEp}, ACL_INT32};
    aclTensor *tp_counts = tensor({1}, ACL_INT32);  // one entry where tpWorldSize is 1
};

template <class Call>
void in_two_stages(const Rank &rank, Call call, aclnnStatus (*run)(void *, uint64_t, aclOpExecutor *, aclrtStream))
{
    NEED(aclrtSetCurrentContext(rank.context));
    uint64_t size = 0;
    aclOpExecutor *executor = nullptr;
    NEED(call(&size, &executor));
    NEED(run(device_bytes(size), size, executor, rank.stream));
}

void wait_for_all(const std::vector<Rank> &ranks)
{
    for (const Rank &rank : ranks) {
        NEED(aclrtSynchronizeStreamWithTimeout(rank.stream, kHangMs));
    }
}

template <class T>
void print_all_equal(const char *label, size_t rank, const Output &output, size_t length, const char *format)
{
    std::vector<T> values(length);
    NEED(aclrtMemcpy(values.data(), length * sizeof(T), output.data, length * sizeof(T), ACL_MEMCPY_DEVICE_TO_HOST));
    bool equal = true;
    for (const T &value : values) {
        equal = equal && std::memcmp(&value, &values[0], sizeof value) == 0;
    }
    std::printf("%s %zu\t%d\t", label, rank, equal ? 0 : 1);
    std::printf(format, values[0]);
    std::printf("\n");
}

// V3 in fp16: 0.5 * (1 + 1 + 0 + 1 + c), where the const expert's c = (1 + 3) / 2: two equal logits, x = 1 and v = 3.
void third(const std::vector<Rank> &ranks, const char *group)
{
    std::vector<Output> rows, outs;
    std::vector<aclTensor *> x, zero, three;
    for (size_t i = 0; i < ranks.size(); i++) {
        NEED(aclrtSetCurrentContext(ranks[i].context));
        rows.emplace_back(Shape{kRows, kHidden}, ACL_FLOAT16);
        outs.emplace_back(Shape{kTokens, kHidden}, ACL_FLOAT16);
        x.push_back(of_halves({kTokens, kHidden}, 1));
        zero.push_back(of_halves({1, kHidden}, 0));
        three.push_back(of_halves({1, kHidden}, 3));
        const Rank &r = ranks[i];
        in_two_stages(r, [&](uint64_t *size, aclOpExecutor **executor) {
            return aclnnMoeDistributeDispatchV3GetWorkspaceSize(
                x[i], r.ids, nullptr, nullptr, nullptr, nullptr, group, kEp, static_cast<int64_t>(i), kExperts, "", 1,
                0, 0, 1, 0, 0, kRows, 0, "", 1, 1, 1, rows[i].handle, r.expand_scales, r.assist, r.nums.handle,
                r.ep_counts.handle, r.tp_counts, r.expand_scales, size, executor);
        }, aclnnMoeDistributeDispatchV3);
    }
    wait_for_all(ranks);
    for (size_t i = 0; i < ranks.size(); i++) {
        const Rank &r = ranks[i];
        in_two_stages(r, [&](uint64_t *size, aclOpExecutor **executor) {
            return aclnnMoeDistributeCombineV3GetWorkspaceSize(
                rows[i].handle, r.ids, r.assist, r.ep_counts.handle, r.weights, r.tp_counts, nullptr, nullptr, nullptr,
                nullptr, nullptr, nullptr, nullptr, x[i], zero[i], zero[i], three[i], group, kEp,
                static_cast<int64_t>(i), kExperts, "", 1, 0, 0, 1, 0, kRows, 0, 0, 0, "", 1, 1, 1, outs[i].handle,
                size, executor);
        }, aclnnMoeDistributeCombineV3);
    }
    wait_for_all(ranks);
    for (size_t i = 0; i < ranks.size(); i++) {
        print_all_equal<int64_t>("V3 tokens of rank", i, ranks[i].nums, 1, "%ld");
        print_all_equal<uint16_t>("V3 rows of rank", i, rows[i], kRows * kHidden, "%04x");
        print_all_equal<uint16_t>("V3 out of rank", i, outs[i], kTokens * kHidden, "%04x");
    }
}

// V4 in bf16 with x = 2, no const expert: 0.5 * (2 + 2 + 0 + 2 + 2) = 4; V2 of the norm adds a residual of 4.
void fourth(const std::vector<Rank> &ranks, const char *group)
{
    std::vector<Output> rows, outs, xs, ys, rstds;
    std::vector<aclTensor *> x;
    for (size_t i = 0; i < ranks.size(); i++) {
        NEED(aclrtSetCurrentContext(ranks[i].context));
        rows.emplace_back(Shape{kRows, kHidden}, ACL_BF16);
        outs.emplace_back(Shape{kTokens, kHidden}, ACL_BF16);
        xs.emplace_back(Shape{kTokens, 1, kHidden}, ACL_BF16);
        ys.emplace_back(Shape{kTokens, 1, kHidden}, ACL_BF16);
        rstds.emplace_back(Shape{kTokens, 1, 1}, ACL_FLOAT);
        x.push_back(of_bf16({kTokens, kHidden}, 2));
        const Rank &r = ranks[i];
        in_two_stages(r, [&](uint64_t *size, aclOpExecutor **executor) {
            return aclnnMoeDistributeDispatchV4GetWorkspaceSize(
                x[i], r.ids, nullptr, nullptr, nullptr, nullptr, nullptr, group, kEp, static_cast<int64_t>(i), kExperts,
                "", 1, 0, 0, 1, 0, 0, kRows, 0, "", 1, 2, 0, rows[i].handle, r.expand_scales, r.assist, r.nums.handle,
                r.ep_counts.handle, r.tp_counts, r.expand_scales, size, executor);
        }, aclnnMoeDistributeDispatchV4);
    }
    wait_for_all(ranks);
    for (size_t i = 0; i < ranks.size(); i++) {
        const Rank &r = ranks[i];
        const auto me = static_cast<int64_t>(i);
        in_two_stages(r, [&](uint64_t *size, aclOpExecutor **executor) {
            return aclnnMoeDistributeCombineV4GetWorkspaceSize(
                rows[i].handle, r.ids, r.assist, r.ep_counts.handle, r.weights, r.tp_counts, nullptr, nullptr, nullptr,
                nullptr, nullptr, nullptr, nullptr, x[i], nullptr, nullptr, nullptr, nullptr, group, kEp, me, kExperts,
                "", 1, 0, 0, 1, 0, kRows, 0, 0, 0, "", 1, 2, 0, outs[i].handle, size, executor);
        }, aclnnMoeDistributeCombineV4);
        in_two_stages(r, [&](uint64_t *size, aclOpExecutor **executor) {
            return aclnnMoeDistributeCombineAddRmsNormV2GetWorkspaceSize(
                rows[i].handle, r.ids, r.assist, r.ep_counts.handle, r.weights, of_bf16({kTokens, 1, kHidden}, 4),
                of_bf16({kHidden}, 3), r.tp_counts, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, x[i],
                nullptr, nullptr, nullptr, group, kEp, me, kExperts, "", 1, 0, 0, 1, 0, kRows, 0, 0, 0, "", 0, 1, 2, 0,
                ys[i].handle, rstds[i].handle, xs[i].handle, size, executor);
        }, aclnnMoeDistributeCombineAddRmsNormV2);
    }
    wait_for_all(ranks);
    for (size_t i = 0; i < ranks.size(); i++) {
        print_all_equal<uint16_t>("V4 out of rank", i, outs[i], kTokens * kHidden, "%04x");
        print_all_equal<uint16_t>("norm x of rank", i, xs[i], kTokens * kHidden, "%04x");
        print_all_equal<uint16_t>("norm y of rank", i, ys[i], kTokens * kHidden, "%04x");
        print_all_equal<float>("norm rstd of rank", i, rstds[i], kTokens, "%.6f");
    }
}

// int64 ids by token: of two replicas token 0 takes the first, token 1 the second, which the active mask drops.
void update(const Rank &rank)
{
    NEED(aclrtSetCurrentContext(rank.context));
    aclTensor *ids = tensor_of<int64_t>({2, 1}, ACL_INT64, {0, 0});
    aclTensor *table = tensor_of<int32_t>({1, 3}, ACL_INT32, {2, 7, 9});
    aclTensor *scales = of_halves({2, 1}, 0.5f), *threshold = tensor_of<float>({1}, ACL_FLOAT, {1.f});
    aclTensor *active = tensor_of<uint8_t>({2}, ACL_BOOL, {1, 0});
    const Output balanced{{2, 1}, ACL_INT64}, mask{{2, 1}, ACL_BOOL};
    in_two_stages(rank, [&](uint64_t *size, aclOpExecutor **executor) {
        return aclnnMoeUpdateExpertGetWorkspaceSize(
            ids, table, scales, threshold, active, -1, -1, 1, balanced.handle, mask.handle, size, executor);
    }, aclnnMoeUpdateExpert);
    NEED(aclrtSynchronizeStreamWithTimeout(rank.stream, kHangMs));
    int64_t values[2];
    uint8_t kept[2];
    NEED(aclrtMemcpy(values, sizeof values, balanced.data, sizeof values, ACL_MEMCPY_DEVICE_TO_HOST));
    NEED(aclrtMemcpy(kept, sizeof kept, mask.data, sizeof kept, ACL_MEMCPY_DEVICE_TO_HOST));
    std::printf("updated\t0\t%ld %ld %d %d\n", values[0], values[1], kept[0], kept[1]);
}

// A value that no first stage can see: expert 9 of 2. The message, at the wait, has the C name.
void wrong_value(const std::vector<Rank> &ranks, const char *group)
{
    for (size_t i = 0; i < ranks.size(); i++) {
        NEED(aclrtSetCurrentContext(ranks[i].context));
        Chain chain;
        chain.ids = tensor_of<int32_t>({kTokens, kTopK}, ACL_INT32, {0, i == 0 ? 9 : 1, 0, 1});
        const Ready ready = ready_dispatch(chain, group, static_cast<int64_t>(i));
        NEED(ready.status);
        NEED(aclnnMoeDistributeDispatchV2(ready.workspace, ready.size, ready.executor, ranks[i].stream));
    }
    report("wrong value", aclrtSynchronizeStreamWithTimeout(ranks[0].stream, kHangMs));
    report("peer of it", aclrtSynchronizeStreamWithTimeout(ranks[1].stream, kHangMs));
}

// Between the two stages the group ends. The message says how C opens one.
void ended_group(const Rank &rank)
{
    int32_t devices[kEp] = {0, 1};
    HcclComm comms[kEp];
    char name[COMM_NAME_MAX_LENGTH];
    NEED(HcclCommInitAll(kEp, devices, comms));
    NEED(HcclGetCommName(comms[0], name));
    NEED(aclrtSetCurrentContext(rank.context));
    const Ready ready = ready_dispatch(Chain(), name, 0);
    NEED(ready.status);
    NEED(HcclCommDestroy(comms[0]));
    NEED(aclnnMoeDistributeDispatchV2(ready.workspace, ready.size, ready.executor, rank.stream));
    report("ended group", aclrtSynchronizeStreamWithTimeout(rank.stream, kHangMs));
}

}  // namespace

int main()
{
    NEED(aclInit(nullptr));
    NEED(aclrtSetDevice(0));
    std::vector<Rank> ranks(kEp);
    for (int rank = 0; rank < kEp; rank++) {
        NEED(aclrtCreateContext(&ranks[static_cast<size_t>(rank)].context, rank));
        NEED(aclrtCreateStream(&ranks[static_cast<size_t>(rank)].stream));
    }
    const std::string group = open_group();
    third(ranks, group.c_str());
    fourth(ranks, group.c_str());
    update(ranks[1]);
    wrong_value(ranks, group.c_str());
    ended_group(ranks[0]);
    NEED(aclFinalize());
    return 0;
}
