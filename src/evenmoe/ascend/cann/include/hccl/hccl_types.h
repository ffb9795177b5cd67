/* Codes and handles of the groups; the numbers are CANN's. */
#ifndef EVENMOE_HCCL_HCCL_TYPES_H
#define EVENMOE_HCCL_HCCL_TYPES_H

#include <stdint.h>
#include <string.h>

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
    HCCL_E_SYSCALL = 8,
    HCCL_E_TIMEOUT = 9,
    HCCL_E_OPEN_FILE_FAILURE = 10,
    HCCL_E_TCP_CONNECT = 11,
    HCCL_E_RUNTIME = 15
} HcclResult;

typedef void *HcclComm;

#define COMM_NAME_MAX_LENGTH 128
#define HCCL_ROOT_INFO_BYTES 4108

/* Sent as it is, all of its bytes. */
typedef struct HcclRootInfoDef {
    char internal[HCCL_ROOT_INFO_BYTES];
} HcclRootInfo;

#define HCCL_COMM_CONFIG_INFO_BYTES 24
#define HCCL_COMM_CONFIG_MAGIC_WORD 0xf0f0f0f0U
#define HCCL_COMM_CONFIG_VERSION 3U
#define HCCL_COMM_BUFFSIZE_CONFIG_NOT_SET 0xffffffffU
#define HCCL_COMM_DETERMINISTIC_CONFIG_NOT_SET 0xffffffffU
#define HCCL_UDI_MAX_LENGTH 128

/* hcclCommName makes a difference here, and hcclBufferSize what HcclGetHcclBuffer says: there are no buffers, and every
   result is deterministic. */
typedef struct HcclCommConfigDef {
    char reserved[HCCL_COMM_CONFIG_INFO_BYTES]; /* its size, the magic word, the version */
    uint32_t hcclBufferSize; /* MB, half of what is allocated */
    uint32_t hcclDeterministic;
    char hcclCommName[COMM_NAME_MAX_LENGTH];
    char hcclUdi[HCCL_UDI_MAX_LENGTH];
    uint32_t hcclOpExpansionMode;
    uint32_t hcclRdmaTrafficClass;
    uint32_t hcclRdmaServiceLevel;
} HcclCommConfig;

/* First of all; the fields that matter are set behind it. */
static inline void HcclCommConfigInit(HcclCommConfig *config)
{
    const uint64_t size = sizeof(HcclCommConfig);
    const uint32_t words[2] = {HCCL_COMM_CONFIG_MAGIC_WORD, HCCL_COMM_CONFIG_VERSION};
    memset(config, 0, sizeof(HcclCommConfig));
    memcpy(config->reserved, &size, sizeof(size));
    memcpy(config->reserved + sizeof(size), words, sizeof(words));
    config->hcclBufferSize = HCCL_COMM_BUFFSIZE_CONFIG_NOT_SET;
    config->hcclDeterministic = HCCL_COMM_DETERMINISTIC_CONFIG_NOT_SET;
}

#ifdef __cplusplus
}
#endif

#endif
