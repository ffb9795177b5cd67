// Random first stages of all ten operators: `fuzz CALLS SEED`. Each call starts from one that is accepted, and has each
// argument replaced with probability 1/12. Ends with a table of statuses; any other end is a failure.
#include <cstdint>
#include <limits>
#include <map>
#include <random>
#include <tuple>

#include "support.h"

namespace {

std::mt19937_64 generator;
std::vector<aclTensor *> tensors;
std::vector<std::string> texts;
std::map<int, long> statuses;
long without_message = 0;

template <class T>
const T &any_of(const std::vector<T> &items)
{
    return items[generator() % items.size()];
}

int64_t random_size()
{
    static const std::vector<int64_t> sizes{0, 1, 2, 2, 2, 3, 4, 4, 16, 17, 512, 513, 1024, 1024, 8193, 1LL << 20,
                                            1LL << 40, std::numeric_limits<int64_t>::max()};
    return any_of(sizes);
}

// A tensor of random shape, dtype, strides, format and memory; some are not valid and stay null.
aclTensor *random_tensor()
{
    static char host[64];
    Shape shape(generator() % 5), strides;
    for (int64_t &size : shape) {
        size = random_size();
        strides.push_back(random_size());
    }
    if (!shape.empty() && generator() % 20 == 0) {
        shape[0] = -static_cast<int64_t>(generator() % 4);
    }
    static const std::vector<void *> memory{device_bytes(4096), device_bytes(1 << 20), device_bytes(8), nullptr, host,
                                            reinterpret_cast<void *>(~uintptr_t{0})};
    static const std::vector<int> types{ACL_FLOAT, ACL_FLOAT16, ACL_BF16, ACL_INT32, ACL_INT32, ACL_INT64, ACL_BOOL,
                                        ACL_INT8, ACL_STRING, ACL_DT_UNDEFINED, 1000};
    void *data = static_cast<char *>(any_of(memory)) + (generator() % 8 == 0 ? generator() % 4 : 0);
    const auto type = static_cast<aclDataType>(any_of(types));
    const auto format = generator() % 16 == 0 ? ACL_FORMAT_FRACTAL_NZ : ACL_FORMAT_ND;
    const int64_t offset = generator() % 4 == 0 ? random_size() : 0;
    return over(data, shape, type, generator() % 2 ? strides.data() : nullptr, offset, format);
}

aclTensor *any_tensor()
{
    switch (generator() % 8) {
        case 0:
            return nullptr;
        case 1:
            return reinterpret_cast<aclTensor *>(generator());  // no handle at all
        default:
            return any_of(tensors);
    }
}

void replace(const aclTensor *&value) { value = any_tensor(); }
void replace(aclTensor *&value) { value = any_tensor(); }
void replace(const char *&value) { value = generator() % 8 == 0 ? nullptr : any_of(texts).c_str(); }
void replace(float &value) { value = generator() % 2 ? std::numeric_limits<float>::quiet_NaN() : -1e30f; }
void replace(uint64_t *&value) { value = generator() % 8 == 0 ? nullptr : value; }
void replace(aclOpExecutor **&value) { value = generator() % 8 == 0 ? nullptr : value; }
void replace(int64_t &value)
{
    static const std::vector<int64_t> values{0, 1, 2, 3, 4, 7, 8, 128, 512, 1024, 2048, -1, -2, 1LL << 31, 1LL << 32,
                                             std::numeric_limits<int64_t>::min(), std::numeric_limits<int64_t>::max()};
    value = any_of(values);
}

template <class... Parameters>
void call(aclnnStatus (*first_stage)(Parameters...), std::tuple<Parameters...> arguments, aclOpExecutor **executor)
{
    *executor = nullptr;
    std::apply([](auto &...each) { ((generator() % 12 == 0 ? replace(each) : void()), ...); }, arguments);
    const aclnnStatus status = std::apply(first_stage, arguments);
    statuses[status]++;
    const char *message = status == 0 ? "" : aclGetRecentErrMsg();
    // An error names its argument in backquotes.
    without_message += status != 0 && (message == nullptr || std::strchr(message, '`') == nullptr) ? 1 : 0;
    if (status == 0) {
        NEED(aclDestroyAclOpExecutor(*executor));
    }
}

}  // namespace

int main(int argc, char **argv)
{
    const long calls = argc > 1 ? std::atol(argv[1]) : 1000;
    generator.seed(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1);
    NEED(aclInit(nullptr));
    NEED(aclrtSetDevice(0));
    const std::string name = open_group();
    const char *group = name.c_str(), *empty = "", *automatic = nullptr;
    texts = {name, "", "other", std::string(127, 'g'), std::string(128, 'g'), std::string(100000, 'g'), "\xff\xfe", "fullmesh_v2"};
    const Chain c;
    for (aclTensor *good : {c.ids, c.table, c.balanced, c.mask, c.x, c.weights, c.expand_x, c.assist, c.gamma, c.residual}) {
        tensors.push_back(good);
    }
    aclTensor *gone = tensor({2, 2}, ACL_INT32);
    NEED(aclDestroyTensor(gone));
    tensors.push_back(gone);
    for (int i = 0; i < 300; i++) {
        tensors.push_back(random_tensor());
    }
    const aclTensor *none = nullptr;
    const int64_t zero = 0;
    uint64_t size_place = 0, *size = &size_place;
    aclOpExecutor *executor_place = nullptr, **e = &executor_place;
    const auto constant = [](aclTensor *tensor) -> const aclTensor * { return tensor; };
    const aclTensor *x = c.x, *ids = c.ids, *table = c.table, *rows = c.expand_x, *assist = c.assist, *counts = c.ep_counts,
                    *weights = c.weights, *peers = c.tp_counts, *residual = c.residual, *gamma = constant(c.gamma);
    const auto ep = std::make_tuple(group, kEp, zero, kExperts, empty, zero, zero, zero, zero, zero);
    const auto received = std::make_tuple(c.expand_x, c.scales, c.assist, c.nums, c.ep_counts, c.tp_counts, c.scales, size, e);
    const auto virtual_experts = std::make_tuple(zero, zero, zero);
    const auto dispatched = std::make_tuple(zero, zero, int64_t{1}, automatic);
    const auto combining = std::make_tuple(zero, zero, zero, zero, automatic);
    const auto optional = std::make_tuple(peers, none, none, none, none, none, none);
    const auto constants = std::make_tuple(none, none, none, none, none);
    const auto from_experts = std::make_tuple(rows, ids, assist, counts, weights);
    const auto added = std::make_tuple(residual, gamma);
    const auto normed = std::make_tuple(c.y, c.rstd, c.x_out_norm, size, e);
    const auto summed = std::make_tuple(c.x_out, size, e);
    const auto eps = std::make_tuple(1e-6f);
    const auto sent = std::make_tuple(x, ids, none, none, none);
    const auto one = std::make_tuple(none);
    for (long i = 0; i < calls; i++) {
        switch (i % 10) {
            case 0:
                call(aclnnMoeEPLBUpdateExpertGetWorkspaceSize,
                     std::make_tuple(ids, table, zero, kEp, zero, c.balanced, size, e), e);
                break;
            case 1:
                call(aclnnMoeUpdateExpertGetWorkspaceSize,
                     std::make_tuple(ids, table, none, none, none, zero, kEp, zero, c.balanced, c.mask, size, e), e);
                break;
            case 2:
                call(aclnnMoeDistributeDispatchV2GetWorkspaceSize, std::tuple_cat(sent, ep, dispatched, received), e);
                break;
            case 3:
                call(aclnnMoeDistributeDispatchV3GetWorkspaceSize,
                     std::tuple_cat(sent, one, ep, dispatched, virtual_experts, received), e);
                break;
            case 4:
                call(aclnnMoeDistributeDispatchV4GetWorkspaceSize,
                     std::tuple_cat(sent, one, one, ep, dispatched, virtual_experts, received), e);
                break;
            case 5:
                call(aclnnMoeDistributeCombineV2GetWorkspaceSize,
                     std::tuple_cat(from_experts, optional, ep, combining, summed), e);
                break;
            case 6:
                call(aclnnMoeDistributeCombineV3GetWorkspaceSize,
                     std::tuple_cat(from_experts, optional, constants, ep, combining, virtual_experts, summed), e);
                break;
            case 7:
                call(aclnnMoeDistributeCombineV4GetWorkspaceSize,
                     std::tuple_cat(from_experts, optional, constants, one, ep, combining, virtual_experts, summed), e);
                break;
            case 8:
                call(aclnnMoeDistributeCombineAddRmsNormGetWorkspaceSize,
                     std::tuple_cat(from_experts, added, optional, ep, combining, eps, normed), e);
                break;
            default:
                call(aclnnMoeDistributeCombineAddRmsNormV2GetWorkspaceSize,
                     std::tuple_cat(from_experts, added, optional, constants, ep, combining, eps, virtual_experts, normed), e);
        }
    }
    for (const auto &[status, times] : statuses) {
        std::printf("%d\t%ld\n", status, times);
    }
    std::printf("without message\t%ld\n", without_message);
    NEED(aclFinalize());
    return 0;
}
