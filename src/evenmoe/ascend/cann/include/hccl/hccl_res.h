/* Where the ranks' communication buffers lie, of which the context of the V5 functions is made. */
#ifndef EVENMOE_HCCL_HCCL_RES_H
#define EVENMOE_HCCL_HCCL_RES_H

#include "hccl/hccl_types.h"

#ifdef __cplusplus
extern "C" {
#endif

/* `addr` is a number that no other rank of no other group has, not memory: there are no buffers. `size` is what HCCL
   would allocate, twice hcclBufferSize of the group's configuration in MB, 200 unless it is set. */
HcclResult HcclGetHcclBuffer(HcclComm comm, void **addr, uint64_t *size);
/* The same of another rank of the group. */
HcclResult HcclGetRemoteIpcHcclBuf(HcclComm comm, uint64_t remoteRank, void **addr, uint64_t *size);

/* The current device's end of a group, by the group's name. */
HcclResult HcclCommGetHandleWithName(const char *commName, HcclComm *comm);
HcclResult HcomGetCommHandleByGroup(const char *group, HcclComm *comm);

#ifdef __cplusplus
}
#endif

#endif
