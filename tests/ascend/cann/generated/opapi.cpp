// libopapi.so: both stages of every operator.
#pragma GCC visibility push(default)
#include "aclnnop/aclnn_moe_eplb_update_expert.h"
#include "aclnnop/aclnn_moe_update_expert.h"
#include "aclnnop/aclnn_moe_distribute_dispatch_v2.h"
#include "aclnnop/aclnn_moe_distribute_dispatch_v3.h"
#include "aclnnop/aclnn_moe_distribute_dispatch_v4.h"
#include "aclnnop/aclnn_moe_distribute_combine_v2.h"
#include "aclnnop/aclnn_moe_distribute_combine_v3.h"
#include "aclnnop/aclnn_moe_distribute_combine_v4.h"
#include "aclnnop/aclnn_moe_distribute_combine_add_rms_norm.h"
#include "aclnnop/aclnn_moe_distribute_combine_add_rms_norm_v2.h"
#include "aclnnop/aclnn_moe_distribute_dispatch.h"
#include "aclnnop/aclnn_moe_distribute_combine.h"
#include "aclnnop/aclnn_moe_distribute_dispatch_setup.h"
#include "aclnnop/aclnn_moe_distribute_dispatch_teardown.h"
#include "aclnnop/aclnn_moe_distribute_combine_setup.h"
#include "aclnnop/aclnn_moe_distribute_combine_teardown.h"
#include "aclnnop/aclnn_moe_distribute_dispatch_v5.h"
#include "aclnnop/aclnn_moe_distribute_combine_v5.h"
#pragma GCC visibility pop

#include "core.h"

aclnnStatus aclnnMoeEPLBUpdateExpertGetWorkspaceSize(
    const aclTensor *expertIds,
    const aclTensor *eplbTable,
    int64_t localRankId,
    int64_t worldSize,
    int64_t balanceMode,
    aclTensor *balancedExpertIds,
    uint64_t *workspaceSize,
    aclOpExecutor **executor)
{
    return evenmoe::stage_one("MoeEPLBUpdateExpert", {expertIds, eplbTable, localRankId, worldSize, balanceMode, balancedExpertIds}, workspaceSize, executor);
}

aclnnStatus aclnnMoeEPLBUpdateExpert(void *workspace, uint64_t workspaceSize, aclOpExecutor *executor, aclrtStream stream)
{
    return evenmoe::stage_two("MoeEPLBUpdateExpert", workspace, workspaceSize, executor, stream);
}

aclnnStatus aclnnMoeUpdateExpertGetWorkspaceSize(
    const aclTensor *expertIds,
    const aclTensor *eplbTable,
    const aclTensor *expertScalesOptional,
    const aclTensor *pruningThresholdOptional,
    const aclTensor *activeMaskOptional,
    int64_t localRankId,
    int64_t worldSize,
    int64_t balanceMode,
    aclTensor *balancedExpertIds,
    aclTensor *balancedActiveMask,
    uint64_t *workspaceSize,
    aclOpExecutor **executor)
{
    return evenmoe::stage_one("MoeUpdateExpert", {expertIds, eplbTable, expertScalesOptional, pruningThresholdOptional, activeMaskOptional, localRankId, worldSize, balanceMode, balancedExpertIds, balancedActiveMask}, workspaceSize, executor);
}

aclnnStatus aclnnMoeUpdateExpert(void *workspace, uint64_t workspaceSize, aclOpExecutor *executor, aclrtStream stream)
{
    return evenmoe::stage_two("MoeUpdateExpert", workspace, workspaceSize, executor, stream);
}

aclnnStatus aclnnMoeDistributeDispatchV2GetWorkspaceSize(
    const aclTensor *x,
    const aclTensor *expertIds,
    const aclTensor *scalesOptional,
    const aclTensor *xActiveMaskOptional,
    const aclTensor *expertScalesOptional,
    const char *groupEp,
    int64_t epWorldSize,
    int64_t epRankId,
    int64_t moeExpertNum,
    const char *groupTp,
    int64_t tpWorldSize,
    int64_t tpRankId,
    int64_t expertShardType,
    int64_t sharedExpertNum,
    int64_t sharedExpertRankNum,
    int64_t quantMode,
    int64_t globalBs,
    int64_t expertTokenNumsType,
    const char *commAlg,
    aclTensor *expandXOut,
    aclTensor *dynamicScalesOut,
    aclTensor *assistInfoForCombineOut,
    aclTensor *expertTokenNumsOut,
    aclTensor *epRecvCountsOut,
    aclTensor *tpRecvCountsOut,
    aclTensor *expandScalesOut,
    uint64_t *workspaceSize,
    aclOpExecutor **executor)
{
    return evenmoe::stage_one("MoeDistributeDispatchV2", {x, expertIds, scalesOptional, xActiveMaskOptional, expertScalesOptional, groupEp, epWorldSize, epRankId, moeExpertNum, groupTp, tpWorldSize, tpRankId, expertShardType, sharedExpertNum, sharedExpertRankNum, quantMode, globalBs, expertTokenNumsType, commAlg, expandXOut, dynamicScalesOut, assistInfoForCombineOut, expertTokenNumsOut, epRecvCountsOut, tpRecvCountsOut, expandScalesOut}, workspaceSize, executor);
}

aclnnStatus aclnnMoeDistributeDispatchV2(void *workspace, uint64_t workspaceSize, aclOpExecutor *executor, aclrtStream stream)
{
    return evenmoe::stage_two("MoeDistributeDispatchV2", workspace, workspaceSize, executor, stream);
}

aclnnStatus aclnnMoeDistributeDispatchV3GetWorkspaceSize(
    const aclTensor *x,
    const aclTensor *expertIds,
    const aclTensor *scalesOptional,
    const aclTensor *xActiveMaskOptional,
    const aclTensor *expertScalesOptional,
    const aclTensor *elasticInfoOptional,
    const char *groupEp,
    int64_t epWorldSize,
    int64_t epRankId,
    int64_t moeExpertNum,
    const char *groupTp,
    int64_t tpWorldSize,
    int64_t tpRankId,
    int64_t expertShardType,
    int64_t sharedExpertNum,
    int64_t sharedExpertRankNum,
    int64_t quantMode,
    int64_t globalBs,
    int64_t expertTokenNumsType,
    const char *commAlg,
    int64_t zeroExpertNum,
    int64_t copyExpertNum,
    int64_t constExpertNum,
    aclTensor *expandXOut,
    aclTensor *dynamicScalesOut,
    aclTensor *assistInfoForCombineOut,
    aclTensor *expertTokenNumsOut,
    aclTensor *epRecvCountsOut,
    aclTensor *tpRecvCountsOut,
    aclTensor *expandScalesOut,
    uint64_t *workspaceSize,
    aclOpExecutor **executor)
{
    return evenmoe::stage_one("MoeDistributeDispatchV3", {x, expertIds, scalesOptional, xActiveMaskOptional, expertScalesOptional, elasticInfoOptional, groupEp, epWorldSize, epRankId, moeExpertNum, groupTp, tpWorldSize, tpRankId, expertShardType, sharedExpertNum, sharedExpertRankNum, quantMode, globalBs, expertTokenNumsType, commAlg, zeroExpertNum, copyExpertNum, constExpertNum, expandXOut, dynamicScalesOut, assistInfoForCombineOut, expertTokenNumsOut, epRecvCountsOut, tpRecvCountsOut, expandScalesOut}, workspaceSize, executor);
}

aclnnStatus aclnnMoeDistributeDispatchV3(void *workspace, uint64_t workspaceSize, aclOpExecutor *executor, aclrtStream stream)
{
    return evenmoe::stage_two("MoeDistributeDispatchV3", workspace, workspaceSize, executor, stream);
}

aclnnStatus aclnnMoeDistributeDispatchV4GetWorkspaceSize(
    const aclTensor *x,
    const aclTensor *expertIds,
    const aclTensor *scalesOptional,
    const aclTensor *xActiveMaskOptional,
    const aclTensor *expertScalesOptional,
    const aclTensor *elasticInfoOptional,
    const aclTensor *performanceInfoOptional,
    const char *groupEp,
    int64_t epWorldSize,
    int64_t epRankId,
    int64_t moeExpertNum,
    const char *groupTp,
    int64_t tpWorldSize,
    int64_t tpRankId,
    int64_t expertShardType,
    int64_t sharedExpertNum,
    int64_t sharedExpertRankNum,
    int64_t quantMode,
    int64_t globalBs,
    int64_t expertTokenNumsType,
    const char *commAlg,
    int64_t zeroExpertNum,
    int64_t copyExpertNum,
    int64_t constExpertNum,
    aclTensor *expandXOut,
    aclTensor *dynamicScalesOut,
    aclTensor *assistInfoForCombineOut,
    aclTensor *expertTokenNumsOut,
    aclTensor *epRecvCountsOut,
    aclTensor *tpRecvCountsOut,
    aclTensor *expandScalesOut,
    uint64_t *workspaceSize,
    aclOpExecutor **executor)
{
    return evenmoe::stage_one("MoeDistributeDispatchV4", {x, expertIds, scalesOptional, xActiveMaskOptional, expertScalesOptional, elasticInfoOptional, performanceInfoOptional, groupEp, epWorldSize, epRankId, moeExpertNum, groupTp, tpWorldSize, tpRankId, expertShardType, sharedExpertNum, sharedExpertRankNum, quantMode, globalBs, expertTokenNumsType, commAlg, zeroExpertNum, copyExpertNum, constExpertNum, expandXOut, dynamicScalesOut, assistInfoForCombineOut, expertTokenNumsOut, epRecvCountsOut, tpRecvCountsOut, expandScalesOut}, workspaceSize, executor);
}

aclnnStatus aclnnMoeDistributeDispatchV4(void *workspace, uint64_t workspaceSize, aclOpExecutor *executor, aclrtStream stream)
{
    return evenmoe::stage_two("MoeDistributeDispatchV4", workspace, workspaceSize, executor, stream);
}

aclnnStatus aclnnMoeDistributeCombineV2GetWorkspaceSize(
    const aclTensor *expandX,
    const aclTensor *expertIds,
    const aclTensor *assistInfoForCombine,
    const aclTensor *epSendCounts,
    const aclTensor *expertScales,
    const aclTensor *tpSendCountsOptional,
    const aclTensor *xActiveMaskOptional,
    const aclTensor *activationScaleOptional,
    const aclTensor *weightScaleOptional,
    const aclTensor *groupListOptional,
    const aclTensor *expandScalesOptional,
    const aclTensor *sharedExpertXOptional,
    const char *groupEp,
    int64_t epWorldSize,
    int64_t epRankId,
    int64_t moeExpertNum,
    const char *groupTp,
    int64_t tpWorldSize,
    int64_t tpRankId,
    int64_t expertShardType,
    int64_t sharedExpertNum,
    int64_t sharedExpertRankNum,
    int64_t globalBs,
    int64_t outDtype,
    int64_t commQuantMode,
    int64_t groupListType,
    const char *commAlg,
    aclTensor *xOut,
    uint64_t *workspaceSize,
    aclOpExecutor **executor)
{
    return evenmoe::stage_one("MoeDistributeCombineV2", {expandX, expertIds, assistInfoForCombine, epSendCounts, expertScales, tpSendCountsOptional, xActiveMaskOptional, activationScaleOptional, weightScaleOptional, groupListOptional, expandScalesOptional, sharedExpertXOptional, groupEp, epWorldSize, epRankId, moeExpertNum, groupTp, tpWorldSize, tpRankId, expertShardType, sharedExpertNum, sharedExpertRankNum, globalBs, outDtype, commQuantMode, groupListType, commAlg, xOut}, workspaceSize, executor);
}

aclnnStatus aclnnMoeDistributeCombineV2(void *workspace, uint64_t workspaceSize, aclOpExecutor *executor, aclrtStream stream)
{
    return evenmoe::stage_two("MoeDistributeCombineV2", workspace, workspaceSize, executor, stream);
}

aclnnStatus aclnnMoeDistributeCombineV3GetWorkspaceSize(
    const aclTensor *expandX,
    const aclTensor *expertIds,
    const aclTensor *assistInfoForCombine,
    const aclTensor *epSendCounts,
    const aclTensor *expertScales,
    const aclTensor *tpSendCountsOptional,
    const aclTensor *xActiveMaskOptional,
    const aclTensor *activationScaleOptional,
    const aclTensor *weightScaleOptional,
    const aclTensor *groupListOptional,
    const aclTensor *expandScalesOptional,
    const aclTensor *sharedExpertXOptional,
    const aclTensor *elasticInfoOptional,
    const aclTensor *oriXOptional,
    const aclTensor *constExpertAlpha1Optional,
    const aclTensor *constExpertAlpha2Optional,
    const aclTensor *constExpertVOptional,
    const char *groupEp,
    int64_t epWorldSize,
    int64_t epRankId,
    int64_t moeExpertNum,
    const char *groupTp,
    int64_t tpWorldSize,
    int64_t tpRankId,
    int64_t expertShardType,
    int64_t sharedExpertNum,
    int64_t sharedExpertRankNum,
    int64_t globalBs,
    int64_t outDtype,
    int64_t commQuantMode,
    int64_t groupListType,
    const char *commAlg,
    int64_t zeroExpertNum,
    int64_t copyExpertNum,
    int64_t constExpertNum,
    aclTensor *xOut,
    uint64_t *workspaceSize,
    aclOpExecutor **executor)
{
    return evenmoe::stage_one("MoeDistributeCombineV3", {expandX, expertIds, assistInfoForCombine, epSendCounts, expertScales, tpSendCountsOptional, xActiveMaskOptional, activationScaleOptional, weightScaleOptional, groupListOptional, expandScalesOptional, sharedExpertXOptional, elasticInfoOptional, oriXOptional, constExpertAlpha1Optional, constExpertAlpha2Optional, constExpertVOptional, groupEp, epWorldSize, epRankId, moeExpertNum, groupTp, tpWorldSize, tpRankId, expertShardType, sharedExpertNum, sharedExpertRankNum, globalBs, outDtype, commQuantMode, groupListType, commAlg, zeroExpertNum, copyExpertNum, constExpertNum, xOut}, workspaceSize, executor);
}

aclnnStatus aclnnMoeDistributeCombineV3(void *workspace, uint64_t workspaceSize, aclOpExecutor *executor, aclrtStream stream)
{
    return evenmoe::stage_two("MoeDistributeCombineV3", workspace, workspaceSize, executor, stream);
}

aclnnStatus aclnnMoeDistributeCombineV4GetWorkspaceSize(
    const aclTensor *expandX,
    const aclTensor *expertIds,
    const aclTensor *assistInfoForCombine,
    const aclTensor *epSendCounts,
    const aclTensor *expertScales,
    const aclTensor *tpSendCountsOptional,
    const aclTensor *xActiveMaskOptional,
    const aclTensor *activationScaleOptional,
    const aclTensor *weightScaleOptional,
    const aclTensor *groupListOptional,
    const aclTensor *expandScalesOptional,
    const aclTensor *sharedExpertXOptional,
    const aclTensor *elasticInfoOptional,
    const aclTensor *oriXOptional,
    const aclTensor *constExpertAlpha1Optional,
    const aclTensor *constExpertAlpha2Optional,
    const aclTensor *constExpertVOptional,
    const aclTensor *performanceInfoOptional,
    const char *groupEp,
    int64_t epWorldSize,
    int64_t epRankId,
    int64_t moeExpertNum,
    const char *groupTp,
    int64_t tpWorldSize,
    int64_t tpRankId,
    int64_t expertShardType,
    int64_t sharedExpertNum,
    int64_t sharedExpertRankNum,
    int64_t globalBs,
    int64_t outDtype,
    int64_t commQuantMode,
    int64_t groupListType,
    const char *commAlg,
    int64_t zeroExpertNum,
    int64_t copyExpertNum,
    int64_t constExpertNum,
    aclTensor *xOut,
    uint64_t *workspaceSize,
    aclOpExecutor **executor)
{
    return evenmoe::stage_one("MoeDistributeCombineV4", {expandX, expertIds, assistInfoForCombine, epSendCounts, expertScales, tpSendCountsOptional, xActiveMaskOptional, activationScaleOptional, weightScaleOptional, groupListOptional, expandScalesOptional, sharedExpertXOptional, elasticInfoOptional, oriXOptional, constExpertAlpha1Optional, constExpertAlpha2Optional, constExpertVOptional, performanceInfoOptional, groupEp, epWorldSize, epRankId, moeExpertNum, groupTp, tpWorldSize, tpRankId, expertShardType, sharedExpertNum, sharedExpertRankNum, globalBs, outDtype, commQuantMode, groupListType, commAlg, zeroExpertNum, copyExpertNum, constExpertNum, xOut}, workspaceSize, executor);
}

aclnnStatus aclnnMoeDistributeCombineV4(void *workspace, uint64_t workspaceSize, aclOpExecutor *executor, aclrtStream stream)
{
    return evenmoe::stage_two("MoeDistributeCombineV4", workspace, workspaceSize, executor, stream);
}

aclnnStatus aclnnMoeDistributeCombineAddRmsNormGetWorkspaceSize(
    const aclTensor *expandX,
    const aclTensor *expertIds,
    const aclTensor *assistInfoForCombine,
    const aclTensor *epSendCounts,
    const aclTensor *expertScales,
    const aclTensor *residualX,
    const aclTensor *gamma,
    const aclTensor *tpSendCountsOptional,
    const aclTensor *xActiveMaskOptional,
    const aclTensor *activationScaleOptional,
    const aclTensor *weightScaleOptional,
    const aclTensor *groupListOptional,
    const aclTensor *expandScalesOptional,
    const aclTensor *sharedExpertXOptional,
    const char *groupEp,
    int64_t epWorldSize,
    int64_t epRankId,
    int64_t moeExpertNum,
    const char *groupTp,
    int64_t tpWorldSize,
    int64_t tpRankId,
    int64_t expertShardType,
    int64_t sharedExpertNum,
    int64_t sharedExpertRankNum,
    int64_t globalBs,
    int64_t outDtype,
    int64_t commQuantMode,
    int64_t groupListType,
    const char *commAlg,
    float normEps,
    aclTensor *yOut,
    aclTensor *rstdOut,
    aclTensor *xOut,
    uint64_t *workspaceSize,
    aclOpExecutor **executor)
{
    return evenmoe::stage_one("MoeDistributeCombineAddRmsNorm", {expandX, expertIds, assistInfoForCombine, epSendCounts, expertScales, residualX, gamma, tpSendCountsOptional, xActiveMaskOptional, activationScaleOptional, weightScaleOptional, groupListOptional, expandScalesOptional, sharedExpertXOptional, groupEp, epWorldSize, epRankId, moeExpertNum, groupTp, tpWorldSize, tpRankId, expertShardType, sharedExpertNum, sharedExpertRankNum, globalBs, outDtype, commQuantMode, groupListType, commAlg, normEps, yOut, rstdOut, xOut}, workspaceSize, executor);
}

aclnnStatus aclnnMoeDistributeCombineAddRmsNorm(void *workspace, uint64_t workspaceSize, aclOpExecutor *executor, aclrtStream stream)
{
    return evenmoe::stage_two("MoeDistributeCombineAddRmsNorm", workspace, workspaceSize, executor, stream);
}

aclnnStatus aclnnMoeDistributeCombineAddRmsNormV2GetWorkspaceSize(
    const aclTensor *expandX,
    const aclTensor *expertIds,
    const aclTensor *assistInfoForCombine,
    const aclTensor *epSendCounts,
    const aclTensor *expertScales,
    const aclTensor *residualX,
    const aclTensor *gamma,
    const aclTensor *tpSendCountsOptional,
    const aclTensor *xActiveMaskOptional,
    const aclTensor *activationScaleOptional,
    const aclTensor *weightScaleOptional,
    const aclTensor *groupListOptional,
    const aclTensor *expandScalesOptional,
    const aclTensor *sharedExpertXOptional,
    const aclTensor *elasticInfoOptional,
    const aclTensor *oriXOptional,
    const aclTensor *constExpertAlpha1Optional,
    const aclTensor *constExpertAlpha2Optional,
    const aclTensor *constExpertVOptional,
    const char *groupEp,
    int64_t epWorldSize,
    int64_t epRankId,
    int64_t moeExpertNum,
    const char *groupTp,
    int64_t tpWorldSize,
    int64_t tpRankId,
    int64_t expertShardType,
    int64_t sharedExpertNum,
    int64_t sharedExpertRankNum,
    int64_t globalBs,
    int64_t outDtype,
    int64_t commQuantMode,
    int64_t groupListType,
    const char *commAlg,
    float normEps,
    int64_t zeroExpertNum,
    int64_t copyExpertNum,
    int64_t constExpertNum,
    aclTensor *yOut,
    aclTensor *rstdOut,
    aclTensor *xOut,
    uint64_t *workspaceSize,
    aclOpExecutor **executor)
{
    return evenmoe::stage_one("MoeDistributeCombineAddRmsNormV2", {expandX, expertIds, assistInfoForCombine, epSendCounts, expertScales, residualX, gamma, tpSendCountsOptional, xActiveMaskOptional, activationScaleOptional, weightScaleOptional, groupListOptional, expandScalesOptional, sharedExpertXOptional, elasticInfoOptional, oriXOptional, constExpertAlpha1Optional, constExpertAlpha2Optional, constExpertVOptional, groupEp, epWorldSize, epRankId, moeExpertNum, groupTp, tpWorldSize, tpRankId, expertShardType, sharedExpertNum, sharedExpertRankNum, globalBs, outDtype, commQuantMode, groupListType, commAlg, normEps, zeroExpertNum, copyExpertNum, constExpertNum, yOut, rstdOut, xOut}, workspaceSize, executor);
}

aclnnStatus aclnnMoeDistributeCombineAddRmsNormV2(void *workspace, uint64_t workspaceSize, aclOpExecutor *executor, aclrtStream stream)
{
    return evenmoe::stage_two("MoeDistributeCombineAddRmsNormV2", workspace, workspaceSize, executor, stream);
}

aclnnStatus aclnnMoeDistributeDispatchGetWorkspaceSize(
    const aclTensor *x,
    const aclTensor *expertIds,
    const aclTensor *scales,
    const aclTensor *xActiveMask,
    const aclTensor *expertScales,
    const char *groupEp,
    int64_t epWorldSize,
    int64_t epRankId,
    int64_t moeExpertNum,
    const char *groupTp,
    int64_t tpWorldSize,
    int64_t tpRankId,
    int64_t expertShardType,
    int64_t sharedExpertNum,
    int64_t sharedExpertRankNum,
    int64_t quantMode,
    int64_t globalBs,
    int64_t expertTokenNumsType,
    aclTensor *expandX,
    aclTensor *dynamicScales,
    aclTensor *expandIdx,
    aclTensor *expertTokenNums,
    aclTensor *epRecvCounts,
    aclTensor *tpRecvCounts,
    aclTensor *expandScales,
    uint64_t *workspaceSize,
    aclOpExecutor **executor)
{
    return evenmoe::stage_one("MoeDistributeDispatch", {x, expertIds, scales, xActiveMask, expertScales, groupEp, epWorldSize, epRankId, moeExpertNum, groupTp, tpWorldSize, tpRankId, expertShardType, sharedExpertNum, sharedExpertRankNum, quantMode, globalBs, expertTokenNumsType, expandX, dynamicScales, expandIdx, expertTokenNums, epRecvCounts, tpRecvCounts, expandScales}, workspaceSize, executor);
}

aclnnStatus aclnnMoeDistributeDispatch(void *workspace, uint64_t workspaceSize, aclOpExecutor *executor, aclrtStream stream)
{
    return evenmoe::stage_two("MoeDistributeDispatch", workspace, workspaceSize, executor, stream);
}

aclnnStatus aclnnMoeDistributeCombineGetWorkspaceSize(
    const aclTensor *expandX,
    const aclTensor *expertIds,
    const aclTensor *expandIdx,
    const aclTensor *epSendCounts,
    const aclTensor *expertScales,
    const aclTensor *tpSendCounts,
    const aclTensor *xActiveMask,
    const aclTensor *activationScale,
    const aclTensor *weightScale,
    const aclTensor *groupList,
    const aclTensor *expandScales,
    const char *groupEp,
    int64_t epWorldSize,
    int64_t epRankId,
    int64_t moeExpertNum,
    const char *groupTp,
    int64_t tpWorldSize,
    int64_t tpRankId,
    int64_t expertShardType,
    int64_t sharedExpertNum,
    int64_t sharedExpertRankNum,
    int64_t globalBs,
    int64_t outDtype,
    int64_t commQuantMode,
    int64_t groupListType,
    aclTensor *x,
    uint64_t *workspaceSize,
    aclOpExecutor **executor)
{
    return evenmoe::stage_one("MoeDistributeCombine", {expandX, expertIds, expandIdx, epSendCounts, expertScales, tpSendCounts, xActiveMask, activationScale, weightScale, groupList, expandScales, groupEp, epWorldSize, epRankId, moeExpertNum, groupTp, tpWorldSize, tpRankId, expertShardType, sharedExpertNum, sharedExpertRankNum, globalBs, outDtype, commQuantMode, groupListType, x}, workspaceSize, executor);
}

aclnnStatus aclnnMoeDistributeCombine(void *workspace, uint64_t workspaceSize, aclOpExecutor *executor, aclrtStream stream)
{
    return evenmoe::stage_two("MoeDistributeCombine", workspace, workspaceSize, executor, stream);
}

aclnnStatus aclnnMoeDistributeDispatchSetupGetWorkspaceSize(
    const aclTensor *x,
    const aclTensor *expertIds,
    const aclTensor *scalesOptional,
    const aclTensor *xActiveMaskOptional,
    const char *groupEp,
    int64_t epWorldSize,
    int64_t epRankId,
    int64_t moeExpertNum,
    int64_t expertShardType,
    int64_t sharedExpertNum,
    int64_t sharedExpertRankNum,
    int64_t quantMode,
    int64_t globalBs,
    int64_t commType,
    const char *commAlg,
    aclTensor *yOut,
    aclTensor *expandIdxOut,
    aclTensor *commCmdInfoOut,
    uint64_t *workspaceSize,
    aclOpExecutor **executor)
{
    return evenmoe::stage_one("MoeDistributeDispatchSetup", {x, expertIds, scalesOptional, xActiveMaskOptional, groupEp, epWorldSize, epRankId, moeExpertNum, expertShardType, sharedExpertNum, sharedExpertRankNum, quantMode, globalBs, commType, commAlg, yOut, expandIdxOut, commCmdInfoOut}, workspaceSize, executor);
}

aclnnStatus aclnnMoeDistributeDispatchSetup(void *workspace, uint64_t workspaceSize, aclOpExecutor *executor, aclrtStream stream)
{
    return evenmoe::stage_two("MoeDistributeDispatchSetup", workspace, workspaceSize, executor, stream);
}

aclnnStatus aclnnMoeDistributeDispatchSetupTeardownCalcOutputSize(
    const aclTensor *x,
    const aclTensor *expertIds,
    const aclTensor *scalesOptional,
    const aclTensor *xActiveMaskOptional,
    const char *groupEp,
    int64_t epWorldSize,
    int64_t epRankId,
    int64_t moeExpertNum,
    int64_t expertShardType,
    int64_t sharedExpertNum,
    int64_t sharedExpertRankNum,
    int64_t quantMode,
    int64_t globalBs,
    int64_t expertTokenNumsType,
    int64_t commType,
    const char *commAlg,
    uint64_t &tokenMsgSize,
    uint64_t &expandIdxOutSize,
    uint64_t &assistInfoForCombineOutSize,
    uint64_t &commCmdInfoOutSize)
{
    (void)expertTokenNumsType;
    const evenmoe::Reply reply = evenmoe::ask("output_sizes", {"MoeDistributeDispatchSetup", x, expertIds, scalesOptional, xActiveMaskOptional, groupEp, epWorldSize, epRankId, moeExpertNum, expertShardType, sharedExpertNum, sharedExpertRankNum, quantMode, globalBs, commType, commAlg});
    if (reply.status == 0) {
        tokenMsgSize = reply.numbers[0];
        expandIdxOutSize = reply.numbers[1];
        assistInfoForCombineOutSize = reply.numbers[2];
        commCmdInfoOutSize = reply.numbers[3];
    }
    return reply.status;
}

aclnnStatus aclnnMoeDistributeDispatchTeardownGetWorkspaceSize(
    const aclTensor *x,
    const aclTensor *y,
    const aclTensor *expertIds,
    const aclTensor *commCmdInfo,
    const char *groupEp,
    int64_t epWorldSize,
    int64_t epRankId,
    int64_t moeExpertNum,
    int64_t expertShardType,
    int64_t sharedExpertNum,
    int64_t sharedExpertRankNum,
    int64_t quantMode,
    int64_t globalBs,
    int64_t expertTokenNumsType,
    int64_t commType,
    const char *commAlg,
    aclTensor *expandXOut,
    aclTensor *dynamicScalesOut,
    aclTensor *assistInfoForCombineOut,
    aclTensor *expertTokenNumsOut,
    uint64_t *workspaceSize,
    aclOpExecutor **executor)
{
    return evenmoe::stage_one("MoeDistributeDispatchTeardown", {x, y, expertIds, commCmdInfo, groupEp, epWorldSize, epRankId, moeExpertNum, expertShardType, sharedExpertNum, sharedExpertRankNum, quantMode, globalBs, expertTokenNumsType, commType, commAlg, expandXOut, dynamicScalesOut, assistInfoForCombineOut, expertTokenNumsOut}, workspaceSize, executor);
}

aclnnStatus aclnnMoeDistributeDispatchTeardown(void *workspace, uint64_t workspaceSize, aclOpExecutor *executor, aclrtStream stream)
{
    return evenmoe::stage_two("MoeDistributeDispatchTeardown", workspace, workspaceSize, executor, stream);
}

aclnnStatus aclnnMoeDistributeCombineSetupGetWorkspaceSize(
    const aclTensor *expandX,
    const aclTensor *expertIds,
    const aclTensor *assistInfoForCombine,
    const char *groupEp,
    int64_t epWorldSize,
    int64_t epRankId,
    int64_t moeExpertNum,
    int64_t expertShardType,
    int64_t sharedExpertNum,
    int64_t sharedExpertRankNum,
    int64_t globalBs,
    int64_t commQuantMode,
    int64_t commType,
    const char *commAlg,
    aclTensor *quantExpandXOut,
    aclTensor *commCmdInfoOut,
    uint64_t *workspaceSize,
    aclOpExecutor **executor)
{
    return evenmoe::stage_one("MoeDistributeCombineSetup", {expandX, expertIds, assistInfoForCombine, groupEp, epWorldSize, epRankId, moeExpertNum, expertShardType, sharedExpertNum, sharedExpertRankNum, globalBs, commQuantMode, commType, commAlg, quantExpandXOut, commCmdInfoOut}, workspaceSize, executor);
}

aclnnStatus aclnnMoeDistributeCombineSetup(void *workspace, uint64_t workspaceSize, aclOpExecutor *executor, aclrtStream stream)
{
    return evenmoe::stage_two("MoeDistributeCombineSetup", workspace, workspaceSize, executor, stream);
}

aclnnStatus aclnnMoeDistributeCombineSetupTeardownCalcOutputSize(
    const aclTensor *expandX,
    const aclTensor *expertIds,
    const aclTensor *assistInfoForCombine,
    const char *groupEp,
    int64_t epWorldSize,
    int64_t epRankId,
    int64_t moeExpertNum,
    int64_t expertShardType,
    int64_t sharedExpertNum,
    int64_t sharedExpertRankNum,
    int64_t globalBs,
    int64_t commQuantMode,
    int64_t commType,
    const char *commAlg,
    uint64_t &tokenMsgSize,
    uint64_t &commCmdInfoOutSize)
{
    const evenmoe::Reply reply = evenmoe::ask("output_sizes", {"MoeDistributeCombineSetup", expandX, expertIds, assistInfoForCombine, groupEp, epWorldSize, epRankId, moeExpertNum, expertShardType, sharedExpertNum, sharedExpertRankNum, globalBs, commQuantMode, commType, commAlg});
    if (reply.status == 0) {
        tokenMsgSize = reply.numbers[0];
        commCmdInfoOutSize = reply.numbers[1];
    }
    return reply.status;
}

aclnnStatus aclnnMoeDistributeCombineTeardownGetWorkspaceSize(
    const aclTensor *expandX,
    const aclTensor *quantExpandX,
    const aclTensor *expertIds,
    const aclTensor *expandIdx,
    const aclTensor *expertScales,
    const aclTensor *commCmdInfo,
    const aclTensor *xActiveMaskOptional,
    const aclTensor *sharedExpertXOptional,
    const char *groupEp,
    int64_t epWorldSize,
    int64_t epRankId,
    int64_t moeExpertNum,
    int64_t expertShardType,
    int64_t sharedExpertNum,
    int64_t sharedExpertRankNum,
    int64_t globalBs,
    int64_t commQuantMode,
    int64_t commType,
    const char *commAlg,
    aclTensor *xOut,
    uint64_t *workspaceSize,
    aclOpExecutor **executor)
{
    return evenmoe::stage_one("MoeDistributeCombineTeardown", {expandX, quantExpandX, expertIds, expandIdx, expertScales, commCmdInfo, xActiveMaskOptional, sharedExpertXOptional, groupEp, epWorldSize, epRankId, moeExpertNum, expertShardType, sharedExpertNum, sharedExpertRankNum, globalBs, commQuantMode, commType, commAlg, xOut}, workspaceSize, executor);
}

aclnnStatus aclnnMoeDistributeCombineTeardown(void *workspace, uint64_t workspaceSize, aclOpExecutor *executor, aclrtStream stream)
{
    return evenmoe::stage_two("MoeDistributeCombineTeardown", workspace, workspaceSize, executor, stream);
}

aclnnStatus aclnnMoeDistributeDispatchV5GetWorkspaceSize(
    const aclTensor *context,
    const aclTensor *x,
    const aclTensor *expertIds,
    const aclTensor *scalesOptional,
    const aclTensor *xActiveMaskOptional,
    const aclTensor *expertScalesOptional,
    const aclTensor *elasticInfoOptional,
    const aclTensor *performanceInfoOptional,
    int64_t epWorldSize,
    int64_t epRankId,
    int64_t moeExpertNum,
    int64_t cclBufferSize,
    int64_t tpWorldSize,
    int64_t tpRankId,
    int64_t expertShardType,
    int64_t sharedExpertNum,
    int64_t sharedExpertRankNum,
    int64_t quantMode,
    int64_t globalBs,
    int64_t expertTokenNumsType,
    const char *commAlg,
    int64_t zeroExpertNum,
    int64_t copyExpertNum,
    int64_t constExpertNum,
    aclTensor *expandXOut,
    aclTensor *dynamicScalesOut,
    aclTensor *assistInfoForCombineOut,
    aclTensor *expertTokenNumsOut,
    aclTensor *epRecvCountsOut,
    aclTensor *tpRecvCountsOut,
    aclTensor *expandScalesOut,
    uint64_t *workspaceSize,
    aclOpExecutor **executor)
{
    return evenmoe::stage_one("MoeDistributeDispatchV5", {context, x, expertIds, scalesOptional, xActiveMaskOptional, expertScalesOptional, elasticInfoOptional, performanceInfoOptional, epWorldSize, epRankId, moeExpertNum, cclBufferSize, tpWorldSize, tpRankId, expertShardType, sharedExpertNum, sharedExpertRankNum, quantMode, globalBs, expertTokenNumsType, commAlg, zeroExpertNum, copyExpertNum, constExpertNum, expandXOut, dynamicScalesOut, assistInfoForCombineOut, expertTokenNumsOut, epRecvCountsOut, tpRecvCountsOut, expandScalesOut}, workspaceSize, executor);
}

aclnnStatus aclnnMoeDistributeDispatchV5(void *workspace, uint64_t workspaceSize, aclOpExecutor *executor, aclrtStream stream)
{
    return evenmoe::stage_two("MoeDistributeDispatchV5", workspace, workspaceSize, executor, stream);
}

aclnnStatus aclnnMoeDistributeCombineV5GetWorkspaceSize(
    const aclTensor *context,
    const aclTensor *expandX,
    const aclTensor *expertIds,
    const aclTensor *assistInfoForCombine,
    const aclTensor *epSendCounts,
    const aclTensor *expertScales,
    const aclTensor *tpSendCountsOptional,
    const aclTensor *xActiveMaskOptional,
    const aclTensor *activationScaleOptional,
    const aclTensor *weightScaleOptional,
    const aclTensor *groupListOptional,
    const aclTensor *expandScalesOptional,
    const aclTensor *sharedExpertXOptional,
    const aclTensor *elasticInfoOptional,
    const aclTensor *oriXOptional,
    const aclTensor *constExpertAlpha1Optional,
    const aclTensor *constExpertAlpha2Optional,
    const aclTensor *constExpertVOptional,
    const aclTensor *performanceInfoOptional,
    int64_t epWorldSize,
    int64_t epRankId,
    int64_t moeExpertNum,
    int64_t cclBufferSize,
    int64_t tpWorldSize,
    int64_t tpRankId,
    int64_t expertShardType,
    int64_t sharedExpertNum,
    int64_t sharedExpertRankNum,
    int64_t globalBs,
    int64_t outDtype,
    int64_t commQuantMode,
    int64_t groupListType,
    const char *commAlg,
    int64_t zeroExpertNum,
    int64_t copyExpertNum,
    int64_t constExpertNum,
    aclTensor *xOut,
    uint64_t *workspaceSize,
    aclOpExecutor **executor)
{
    return evenmoe::stage_one("MoeDistributeCombineV5", {context, expandX, expertIds, assistInfoForCombine, epSendCounts, expertScales, tpSendCountsOptional, xActiveMaskOptional, activationScaleOptional, weightScaleOptional, groupListOptional, expandScalesOptional, sharedExpertXOptional, elasticInfoOptional, oriXOptional, constExpertAlpha1Optional, constExpertAlpha2Optional, constExpertVOptional, performanceInfoOptional, epWorldSize, epRankId, moeExpertNum, cclBufferSize, tpWorldSize, tpRankId, expertShardType, sharedExpertNum, sharedExpertRankNum, globalBs, outDtype, commQuantMode, groupListType, commAlg, zeroExpertNum, copyExpertNum, constExpertNum, xOut}, workspaceSize, executor);
}

aclnnStatus aclnnMoeDistributeCombineV5(void *workspace, uint64_t workspaceSize, aclOpExecutor *executor, aclrtStream stream)
{
    return evenmoe::stage_two("MoeDistributeCombineV5", workspace, workspaceSize, executor, stream);
}
