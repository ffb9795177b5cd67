/* The runtime calls that the operators of evenmoe and their samples need, on the CPU. */
#ifndef EVENMOE_ACL_ACL_H
#define EVENMOE_ACL_ACL_H

#include "acl/acl_base.h"
#include "acl/acl_rt.h"

#ifdef __cplusplus
extern "C" {
#endif

/* `configPath` is not read. */
aclError aclInit(const char *configPath);

/* Drops the work that is still queued, and every stream, context, group and allocation. */
aclError aclFinalize(void);

#ifdef __cplusplus
}
#endif

#endif
