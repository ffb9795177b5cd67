// libhccl.so: groups of devices.
#pragma GCC visibility push(default)
#include "hccl/hccl.h"
#include "hccl/hccl_res.h"
#pragma GCC visibility pop

#include <cstring>

#include "core.h"

using evenmoe::ask;
using evenmoe::current_context;
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

HcclResult buffer_of(const char *function, const std::vector<Value> &arguments, void **addr, uint64_t *size)
{
    const Reply reply = ask(function, arguments);
    if (reply.status == HCCL_SUCCESS) {
        *addr = reinterpret_cast<void *>(reply.numbers[0]);
        *size = static_cast<uint64_t>(reply.numbers[1]);
    }
    return result(reply.status);
}

HcclResult joined(const char *function, std::vector<Value> arguments, HcclComm *comm)
{
    arguments.emplace_back(current_context());
    arguments.emplace_back(static_cast<const void *>(comm));
    const Reply reply = ask(function, arguments);
    if (reply.status == HCCL_SUCCESS) {
        *comm = reinterpret_cast<HcclComm>(reply.numbers[0]);
    }
    return result(reply.status);
}

// The name that a configuration gives a group; NULL for a configuration that is none.
const char *name_of(const HcclCommConfig *config, std::string &name)
{
    uint32_t magic = 0;
    if (config != nullptr) {
        std::memcpy(&magic, config->reserved + sizeof(uint64_t), sizeof(magic));
    }
    if (magic != HCCL_COMM_CONFIG_MAGIC_WORD) {
        return nullptr;
    }
    name.assign(config->hcclCommName, strnlen(config->hcclCommName, COMM_NAME_MAX_LENGTH - 1));
    return name.c_str();
}

HcclResult no_config(const HcclCommConfig *config)
{
    const char *value = config == nullptr ? "a null pointer" : "not initialized";
    return result(evenmoe::fail(config == nullptr ? HCCL_E_PTR : HCCL_E_PARA,
                                std::string("`config` is ") + value + ": call HcclCommConfigInit first."));
}

}  // namespace

HcclResult HcclGetRootInfo(HcclRootInfo *rootInfo)
{
    const Reply reply = ask("hccl_root_info", {static_cast<const void *>(rootInfo)});
    if (reply.status == HCCL_SUCCESS) {
        std::memset(rootInfo->internal, 0, HCCL_ROOT_INFO_BYTES);
        std::strncpy(rootInfo->internal, reply.text.c_str(), HCCL_ROOT_INFO_BYTES - 1);
    }
    return result(reply.status);
}

HcclResult HcclCommInitRootInfo(uint32_t nRanks, const HcclRootInfo *rootInfo, uint32_t rank, HcclComm *comm)
{
    return joined("hccl_init_root_info", {nRanks, rootInfo == nullptr ? nullptr : rootInfo->internal, rank, "", HCCL_COMM_BUFFSIZE_CONFIG_NOT_SET}, comm);
}

HcclResult HcclCommInitRootInfoConfig(
    uint32_t nRanks, const HcclRootInfo *rootInfo, uint32_t rank, const HcclCommConfig *config, HcclComm *comm)
{
    std::string text;
    const char *name = name_of(config, text);
    if (name == nullptr) {
        return no_config(config);
    }
    const char *info = rootInfo == nullptr ? nullptr : rootInfo->internal;
    return joined("hccl_init_root_info", {nRanks, info, rank, name, config->hcclBufferSize}, comm);
}

HcclResult HcclCommInitClusterInfo(const char *clusterInfo, uint32_t rank, HcclComm *comm)
{
    return joined("hccl_init_cluster_info", {clusterInfo, rank, "", HCCL_COMM_BUFFSIZE_CONFIG_NOT_SET}, comm);
}

HcclResult HcclCommInitClusterInfoConfig(
    const char *clusterInfo, uint32_t rank, HcclCommConfig *config, HcclComm *comm)
{
    std::string text;
    const char *name = name_of(config, text);
    if (name == nullptr) {
        return no_config(config);
    }
    return joined("hccl_init_cluster_info", {clusterInfo, rank, name, config->hcclBufferSize}, comm);
}

HcclResult HcclBarrier(HcclComm comm, aclrtStream stream)
{
    return result(ask("hccl_barrier", {comm, stream, current_context()}).status);
}

const char *HcclGetErrorString(HcclResult code)
{
    switch (code) {
        case HCCL_SUCCESS:
            return "no error";
        case HCCL_E_PARA:
            return "parameter error";
        case HCCL_E_PTR:
            return "empty pointer";
        case HCCL_E_MEMORY:
            return "memory error";
        case HCCL_E_INTERNAL:
            return "internal error";
        case HCCL_E_NOT_SUPPORT:
            return "not supported";
        case HCCL_E_NOT_FOUND:
            return "not found";
        case HCCL_E_UNAVAIL:
            return "resource unavailable";
        case HCCL_E_SYSCALL:
            return "system call error";
        case HCCL_E_TIMEOUT:
            return "timeout";
        case HCCL_E_OPEN_FILE_FAILURE:
            return "open file failure";
        case HCCL_E_TCP_CONNECT:
            return "tcp connect failure";
        case HCCL_E_RUNTIME:
            return "runtime error";
    }
    return "unknown error";
}

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

HcclResult HcclGetHcclBuffer(HcclComm comm, void **addr, uint64_t *size)
{
    return buffer_of("hccl_buffer", {comm, static_cast<const void *>(addr), size}, addr, size);
}

HcclResult HcclGetRemoteIpcHcclBuf(HcclComm comm, uint64_t remoteRank, void **addr, uint64_t *size)
{
    return buffer_of("hccl_remote_buffer", {comm, remoteRank, static_cast<const void *>(addr), size}, addr, size);
}

HcclResult HcclCommGetHandleWithName(const char *commName, HcclComm *comm)
{
    return joined("hccl_find", {commName}, comm);
}

HcclResult HcomGetCommHandleByGroup(const char *group, HcclComm *comm)
{
    return joined("hccl_find", {group}, comm);
}
