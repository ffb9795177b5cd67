/* Codes and handles of the groups; the numbers are CANN's. */
#ifndef EVENMOE_HCCL_HCCL_TYPES_H
#define EVENMOE_HCCL_HCCL_TYPES_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
    HCCL_SUCCESS = 0,
    HCCL_E_PARA = 1,
    HCCL_E_PTR = 2,
    HCCL_E_MEMORY = 3,
    HCCL_E_INTERNAL = 4,
    HCCL_E_NOT_SUPPORT = 5,
    HCCL_E_NOT_FOUND = 6,
    HCCL_E_UNAVAIL = 7,
    HCCL_E_TIMEOUT = 9,
    HCCL_E_RUNTIME = 15
} HcclResult;

typedef void *HcclComm;

#define COMM_NAME_MAX_LENGTH 128

#ifdef __cplusplus
}
#endif

#endif
