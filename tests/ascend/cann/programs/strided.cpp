// Tensors that are views: transposed, with an offset, with gaps between rows. Prints what came out and what stayed.
#include "support.h"

namespace {

constexpr uint16_t kUntouched = 0x5555;

template <class T>
std::vector<T> read(const void *data, size_t length)
{
    std::vector<T> values(length);
    NEED(aclrtMemcpy(values.data(), length * sizeof(T), data, length * sizeof(T), ACL_MEMCPY_DEVICE_TO_HOST));
    return values;
}

template <class T>
void *put(const std::vector<T> &values)
{
    void *data = device_bytes(values.size() * sizeof(T));
    NEED(aclrtMemcpy(data, values.size() * sizeof(T), values.data(), values.size() * sizeof(T), ACL_MEMCPY_HOST_TO_DEVICE));
    return data;
}

void print(const char *label, const std::vector<int32_t> &values)
{
    std::printf("%s\t0\t", label);
    for (int32_t value : values) {
        std::printf("%d ", value);
    }
    std::printf("\n");
}

// ids (3,2) stored transposed behind an offset of 1; the table's rows 4 apart; the output's 3 apart, from element 2.
void update_expert(aclrtStream stream)
{
    void *ids = put<int32_t>({9, 0, 1, 2, 2, 1, 0});
    void *table = put<int32_t>({1, 10, -7, -7, 2, 11, 12, -7, 1, 13, -7, -7});
    void *out = put<int32_t>(std::vector<int32_t>(12, -1));
    const int64_t id_strides[] = {1, 3}, table_strides[] = {4, 1}, out_strides[] = {3, 1};
    Chain c;
    c.ids = over(ids, {3, 2}, ACL_INT32, id_strides, 1);
    c.table = over(table, {3, 3}, ACL_INT32, table_strides);
    c.balanced = over(out, {3, 2}, ACL_INT32, out_strides, 2);
    uint64_t size = 0;
    aclOpExecutor *executor = nullptr;
    // Rank 3 of 4: of two replicas the second, 3 / ceil(4 / 2) + 1 = 2.
    NEED(aclnnMoeEPLBUpdateExpertGetWorkspaceSize(c.ids, c.table, 3, 4, 0, c.balanced, &size, &executor));
    NEED(aclnnMoeEPLBUpdateExpert(device_bytes(size), size, executor, stream));
    NEED(aclrtSynchronizeStream(stream));
    print("balanced", read<int32_t>(out, 12));
}

// One rank's dispatch: x is every second column behind an offset, expandX has rows 1500 apart.
void *start_dispatch(const Chain &chain, const char *group, int64_t rank, aclrtStream stream)
{
    std::vector<uint16_t> stored(1 + kTokens * 2 * kHidden, 0x7FC0);  // NaN wherever x does not lie
    for (int64_t token = 0; token < kTokens; token++) {
        for (int64_t column = 0; column < kHidden; column++) {
            stored[1 + token * 2 * kHidden + 2 * column] = static_cast<uint16_t>(0x4000 + 100 * rank + 10 * token + column % 7);
        }
    }
    const int64_t x_strides[] = {2 * kHidden, 2}, out_strides[] = {1500, 1};
    void *out = device_bytes(kRows * 1500 * 2, 0x55);
    Chain c = chain;
    c.x = over(put(stored), {kTokens, kHidden}, ACL_BF16, x_strides, 1);
    c.expand_x = over(out, {kRows, kHidden}, ACL_BF16, out_strides);
    const Ready ready = ready_dispatch(c, group, rank);
    NEED(ready.status);
    NEED(aclnnMoeDistributeDispatchV2(ready.workspace, ready.size, ready.executor, stream));
    return out;
}

// Every rank's expert gets both tokens of rank 0, then of rank 1.
int wrong_elements(const void *out)
{
    const std::vector<uint16_t> rows = read<uint16_t>(out, kRows * 1500);
    int wrong = 0;
    for (int64_t row = 0; row < kRows; row++) {
        for (int64_t column = 0; column < 1500; column++) {
            const int64_t rank = row / kTokens, token = row % kTokens;
            const int64_t sent = 0x4000 + 100 * rank + 10 * token + column % 7;
            wrong += rows[row * 1500 + column] != (column < kHidden ? sent : kUntouched) ? 1 : 0;
        }
    }
    return wrong;
}

}  // namespace

int main()
{
    NEED(aclInit(nullptr));
    aclrtContext contexts[kEp];
    aclrtStream streams[kEp];
    void *outs[kEp];
    for (int rank = 0; rank < kEp; rank++) {
        NEED(aclrtCreateContext(&contexts[rank], rank));
        NEED(aclrtCreateStream(&streams[rank]));
    }
    const std::string group = open_group();
    update_expert(streams[1]);
    for (int rank = 0; rank < kEp; rank++) {
        NEED(aclrtSetCurrentContext(contexts[rank]));
        outs[rank] = start_dispatch(Chain(), group.c_str(), rank, streams[rank]);
    }
    for (int rank = 0; rank < kEp; rank++) {
        NEED(aclrtSynchronizeStream(streams[rank]));
        std::printf("wrong elements of rank %d\t%d\t\n", rank, wrong_elements(outs[rank]));
    }
    NEED(aclFinalize());
    return 0;
}
