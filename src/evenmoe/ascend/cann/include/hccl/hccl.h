/* Groups of devices of this process. */
#ifndef EVENMOE_HCCL_HCCL_H
#define EVENMOE_HCCL_HCCL_H

#include "acl/acl_base.h"
#include "hccl/hccl_types.h"

#ifdef __cplusplus
extern "C" {
#endif

/* One group of `ndev` devices: comms[i] is the end of devices[i], which is rank i. */
HcclResult HcclCommInitAll(uint32_t ndev, int32_t *devices, HcclComm *comms);
HcclResult HcclCommDestroy(HcclComm comm);
/* `commName` has room for COMM_NAME_MAX_LENGTH characters. */
HcclResult HcclGetCommName(HcclComm comm, char *commName);
HcclResult HcclGetRankSize(HcclComm comm, uint32_t *rankSize);
HcclResult HcclGetRankId(HcclComm comm, uint32_t *rank);

#ifdef __cplusplus
}
#endif

#endif
