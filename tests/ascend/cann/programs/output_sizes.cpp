// What the setups' second functions give, label by label, as `support.h` prints statuses.
#include "aclnnop/aclnn_moe_distribute_combine_setup.h"
#include "aclnnop/aclnn_moe_distribute_dispatch_setup.h"

#include <cstdint>
#include <cstdio>
#include <vector>

#include "acl/acl.h"

namespace {
aclTensor *tensor(const std::vector<int64_t> &shape, aclDataType type)
{
    return aclCreateTensor(shape.data(), shape.size(), type, nullptr, 0, ACL_FORMAT_ND, shape.data(), shape.size(),
                           nullptr);
}

void dispatch(const char *label, const aclTensor *x, const aclTensor *ids, int64_t rank, int64_t shared,
              int64_t sharedRanks, int64_t quantMode)
{
    uint64_t columns = 0, index = 0, assist = 0, commands = 0;
    const int status = aclnnMoeDistributeDispatchSetupTeardownCalcOutputSize(
        x, ids, nullptr, nullptr, "ep", 4, rank, 32, 0, shared, sharedRanks, quantMode, 0, 1, 2, "", columns, index,
        assist, commands);
    std::printf("%s\t%d\t%llu %llu %llu %llu\n", label, status, (unsigned long long)columns,
                (unsigned long long)index, (unsigned long long)assist, (unsigned long long)commands);
}
}  // namespace

int main()
{
    aclInit(nullptr);
    aclTensor *x = tensor({8, 4096}, ACL_BF16), *ids = tensor({8, 6}, ACL_INT32), *flat = tensor({8}, ACL_INT32);
    dispatch("plain", x, ids, 0, 0, 0, 0);
    dispatch("quantized", x, ids, 3, 1, 0, 2);
    dispatch("shared", x, ids, 1, 1, 2, 0);
    dispatch("null", nullptr, ids, 0, 0, 0, 0);
    dispatch("flat", x, flat, 0, 0, 0, 0);
    dispatch("all shared", x, ids, 0, 1, 4, 0);
    uint64_t columns = 0, commands = 0;
    const int status = aclnnMoeDistributeCombineSetupTeardownCalcOutputSize(x, ids, nullptr, "ep", 4, 0, 32, 0, 0, 0, 0,
                                                                            0, 2, "", columns, commands);
    std::printf("combine\t%d\t%llu %llu\n", status, (unsigned long long)columns, (unsigned long long)commands);
    aclDestroyTensor(x);
    aclDestroyTensor(ids);
    aclDestroyTensor(flat);
    aclFinalize();
    return 0;
}
