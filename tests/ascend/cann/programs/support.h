// What the test programs share: tensors of the smallest chain, and one line per status for the tests to read.
#ifndef TESTS_SUPPORT_H
#define TESTS_SUPPORT_H

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "acl/acl.h"
#include "aclnnop/aclnn_moe_distribute_combine_add_rms_norm.h"
#include "aclnnop/aclnn_moe_distribute_combine_add_rms_norm_v2.h"
#include "aclnnop/aclnn_moe_distribute_combine_v2.h"
#include "aclnnop/aclnn_moe_distribute_combine_v3.h"
#include "aclnnop/aclnn_moe_distribute_combine_v4.h"
#include "aclnnop/aclnn_moe_distribute_dispatch_v2.h"
#include "aclnnop/aclnn_moe_distribute_dispatch_v3.h"
#include "aclnnop/aclnn_moe_distribute_dispatch_v4.h"
#include "aclnnop/aclnn_moe_eplb_update_expert.h"
#include "aclnnop/aclnn_moe_update_expert.h"
#include "hccl/hccl.h"

// Two ranks with one expert each; 2 tokens of 1024 columns per rank, each for both experts.
constexpr int64_t kEp = 2, kTokens = 2, kTopK = 2, kHidden = 1024, kExperts = 2, kRows = kEp * kTokens;
constexpr int32_t kHangMs = 300000;  // ends a program that hangs; nothing is measured with it

using Shape = std::vector<int64_t>;

inline void report(const char *label, int status)
{
    const char *message = status == 0 ? nullptr : aclGetRecentErrMsg();
    std::printf("%s\t%d\t%s\n", label, status, message == nullptr ? "" : message);
    std::fflush(stdout);
}

inline void need(bool good, const char *what)
{
    if (!good) {
        const char *message = aclGetRecentErrMsg();
        std::printf("the test itself failed at %s: %s\n", what, message == nullptr ? "" : message);
        std::exit(3);
    }
}
#define NEED(call) need((call) == 0, #call)

inline size_t count(const Shape &shape)
{
    size_t product = 1;
    for (int64_t size : shape) {
        product *= static_cast<size_t>(size);
    }
    return product;
}

inline void *device_bytes(size_t bytes, int value = 0)
{
    void *data = nullptr;
    NEED(aclrtMalloc(&data, bytes, ACL_MEM_MALLOC_HUGE_FIRST));
    NEED(aclrtMemset(data, bytes, value, bytes));
    return data;
}

inline aclTensor *over(void *data, const Shape &shape, aclDataType type, const int64_t *strides = nullptr,
                       int64_t offset = 0, aclFormat format = ACL_FORMAT_ND)
{
    return aclCreateTensor(
        shape.data(), shape.size(), type, strides, offset, format, shape.data(), shape.size(), data);
}

// A zero-filled tensor with memory of its own, if it has elements.
inline aclTensor *tensor(const Shape &shape, aclDataType type)
{
    const size_t bytes = count(shape) * aclDataTypeSize(type);
    return over(bytes == 0 ? nullptr : device_bytes(bytes), shape, type);
}

template <class T>
aclTensor *tensor_of(const Shape &shape, aclDataType type, const std::vector<T> &values)
{
    void *data = device_bytes(values.size() * sizeof(T));
    NEED(aclrtMemcpy(data, values.size() * sizeof(T), values.data(), values.size() * sizeof(T), ACL_MEMCPY_HOST_TO_DEVICE));
    return over(data, shape, type);
}

// One rank's tensors of the chain; the weights are 0.5, the ids {0, 1} for every token.
struct Chain {
    aclTensor *ids = tensor_of<int32_t>({kTokens, kTopK}, ACL_INT32, {0, 1, 0, 1});
    aclTensor *table = tensor_of<int32_t>({kExperts, 2}, ACL_INT32, {1, 0, 1, 1});
    aclTensor *balanced = tensor({kTokens, kTopK}, ACL_INT32);
    aclTensor *mask = tensor({kTokens, kTopK}, ACL_BOOL);
    aclTensor *x = tensor_of<uint16_t>({kTokens, kHidden}, ACL_BF16, std::vector<uint16_t>(kTokens * kHidden, 0x3F80));
    aclTensor *weights = tensor_of<float>({kTokens, kTopK}, ACL_FLOAT, std::vector<float>(kTokens * kTopK, 0.5f));
    aclTensor *expand_x = tensor({kRows, kHidden}, ACL_BF16);
    aclTensor *scales = tensor({kRows}, ACL_FLOAT);
    aclTensor *assist = tensor({128 * kRows}, ACL_INT32);
    aclTensor *nums = tensor({1}, ACL_INT64);
    aclTensor *ep_counts = tensor({kEp}, ACL_INT32);
    aclTensor *tp_counts = tensor({0}, ACL_INT32);
    aclTensor *residual = tensor({kTokens, 1, kHidden}, ACL_BF16);
    aclTensor *gamma = tensor({kHidden}, ACL_BF16);
    aclTensor *y = tensor({kTokens, 1, kHidden}, ACL_BF16);
    aclTensor *rstd = tensor({kTokens, 1, 1}, ACL_FLOAT);
    aclTensor *x_out = tensor({kTokens, kHidden}, ACL_BF16);
    aclTensor *x_out_norm = tensor({kTokens, 1, kHidden}, ACL_BF16);
};

struct Ready {
    aclnnStatus status = 0;
    uint64_t size = 0;
    aclOpExecutor *executor = nullptr;
    void *workspace = nullptr;

    void allocate()
    {
        if (status == 0 && size > 0) {
            NEED(aclrtMalloc(&workspace, size, ACL_MEM_MALLOC_HUGE_FIRST));
        }
    }
};

inline Ready ready_update(const Chain &c)
{
    Ready ready;
    ready.status = aclnnMoeEPLBUpdateExpertGetWorkspaceSize(
        c.ids, c.table, 0, kEp, 0, c.balanced, &ready.size, &ready.executor);
    ready.allocate();
    return ready;
}

inline Ready ready_dispatch(const Chain &c, const char *group, int64_t rank)
{
    Ready ready;
    ready.status = aclnnMoeDistributeDispatchV2GetWorkspaceSize(
        c.x, c.ids, nullptr, nullptr, nullptr, group, kEp, rank, kExperts, "", 0, 0, 0, 0, 0, 0, 0, 1, nullptr,
        c.expand_x, c.scales, c.assist, c.nums, c.ep_counts, c.tp_counts, c.scales, &ready.size, &ready.executor);
    ready.allocate();
    return ready;
}

// Group name of devices 0 and 1, which stay open.
inline std::string open_group()
{
    int32_t devices[kEp] = {0, 1};
    HcclComm comms[kEp];
    NEED(HcclCommInitAll(kEp, devices, comms));
    char name[COMM_NAME_MAX_LENGTH];
    NEED(HcclGetCommName(comms[0], name));
    return name;
}

#endif
