/* Groups of devices: of this process, or of one device in each of several processes on this host. */
#ifndef EVENMOE_HCCL_HCCL_H
#define EVENMOE_HCCL_HCCL_H

#include "acl/acl_base.h"
#include "hccl/hccl_types.h"

#ifdef __cplusplus
extern "C" {
#endif

/* One group of `ndev` devices: comms[i] is the end of devices[i], which is rank i. */
HcclResult HcclCommInitAll(uint32_t ndev, int32_t *devices, HcclComm *comms);

/* On one process, whose `rootInfo` then goes to all: they pass it to HcclCommInitRootInfo, which returns once all
   `nRanks` ranks have come, or after two minutes with HCCL_E_TIMEOUT; the message names those that did not. */
HcclResult HcclGetRootInfo(HcclRootInfo *rootInfo);
HcclResult HcclCommInitRootInfo(uint32_t nRanks, const HcclRootInfo *rootInfo, uint32_t rank, HcclComm *comm);
HcclResult HcclCommInitRootInfoConfig(
    uint32_t nRanks, const HcclRootInfo *rootInfo, uint32_t rank, const HcclCommConfig *config, HcclComm *comm);

/* `clusterInfo` is the path of a rank table, with one server: HCCL_E_NOT_SUPPORT for several. */
HcclResult HcclCommInitClusterInfo(const char *clusterInfo, uint32_t rank, HcclComm *comm);
HcclResult HcclCommInitClusterInfoConfig(
    const char *clusterInfo, uint32_t rank, HcclCommConfig *config, HcclComm *comm);

/* Waits for the calls that were launched over this end, a minute at most, and says which was not done. */
HcclResult HcclCommDestroy(HcclComm comm);
/* What `stream` is given from now on waits until all ranks have come to their barrier. */
HcclResult HcclBarrier(HcclComm comm, aclrtStream stream);
const char *HcclGetErrorString(HcclResult code);
/* `commName` has room for COMM_NAME_MAX_LENGTH characters. */
HcclResult HcclGetCommName(HcclComm comm, char *commName);
HcclResult HcclGetRankSize(HcclComm comm, uint32_t *rankSize);
HcclResult HcclGetRankId(HcclComm comm, uint32_t *rank);

#ifdef __cplusplus
}
#endif

#endif
