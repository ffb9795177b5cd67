/* How the headers of operators mark what they declare. */
#ifndef EVENMOE_ACLNN_ACLNN_UTIL_H
#define EVENMOE_ACLNN_ACLNN_UTIL_H

#include "aclnn/aclnn_base.h"

#define ACLNN_API __attribute__((visibility("default")))

#endif
