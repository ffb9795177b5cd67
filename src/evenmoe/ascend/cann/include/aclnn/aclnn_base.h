/* What every header of aclnnop/ includes. */
#ifndef EVENMOE_ACLNN_ACLNN_BASE_H
#define EVENMOE_ACLNN_ACLNN_BASE_H

#include "aclnn/acl_meta.h"

#ifdef __cplusplus
extern "C" {
#endif

aclnnStatus aclnnInit(const char *configPath);
aclnnStatus aclnnFinalize(void);

#ifdef __cplusplus
}
#endif

#endif
