// libhccl.so: groups of devices.
#pragma GCC visibility push(default)
#include "hccl/hccl.h"
#pragma GCC visibility pop

#include <cstring>

#include "core.h"

using evenmoe::ask;
using evenmoe::Reply;
using evenmoe::Value;

namespace {

constexpr uint32_t kMostDevices = 4096;  // an array said to be longer is not read; no machine has so many

HcclResult result(int status)
{
    return static_cast<HcclResult>(status);
}

HcclResult rank_value(const char *function, HcclComm comm, uint32_t *out)
{
    const Reply reply = ask(function, {comm, out});
    if (reply.status == HCCL_SUCCESS) {
        *out = static_cast<uint32_t>(reply.numbers[0]);
    }
    return result(reply.status);
}

}  // namespace

HcclResult HcclCommInitAll(uint32_t ndev, int32_t *devices, HcclComm *comms)
{
    std::vector<int64_t> wide;
    wide.reserve(1);  // so that an empty list is none at a null pointer
    if (devices != nullptr && ndev <= kMostDevices) {
        wide.assign(devices, devices + ndev);
    }
    const Value list(devices == nullptr ? nullptr : wide.data(), wide.size());
    const Reply reply = ask("hccl_init_all", {ndev, list, comms});
    for (size_t i = 0; i < reply.numbers.size(); i++) {
        comms[i] = reinterpret_cast<HcclComm>(reply.numbers[i]);
    }
    return result(reply.status);
}

HcclResult HcclCommDestroy(HcclComm comm)
{
    return result(ask("hccl_destroy", {comm}).status);
}

HcclResult HcclGetCommName(HcclComm comm, char *commName)
{
    const Reply reply = ask("hccl_name", {comm, static_cast<const void *>(commName)});
    if (reply.status == HCCL_SUCCESS) {
        std::strncpy(commName, reply.text.c_str(), COMM_NAME_MAX_LENGTH - 1);
        commName[COMM_NAME_MAX_LENGTH - 1] = '\0';
    }
    return result(reply.status);
}

HcclResult HcclGetRankSize(HcclComm comm, uint32_t *rankSize)
{
    return rank_value("hccl_rank_size", comm, rankSize);
}

HcclResult HcclGetRankId(HcclComm comm, uint32_t *rank)
{
    return rank_value("hccl_rank_id", comm, rank);
}
