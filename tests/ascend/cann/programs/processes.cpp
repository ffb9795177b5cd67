// One process for each rank: `processes WAY RANKS WHAT`; WAY is `root` or the path of a rank table, WHAT is none, or
// what befalls the last rank: late or dies.
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>

#include "support.h"

namespace {

// What the group of RANKS processes gives: every rank sends each of its tokens to all experts, one on each rank.
void chain(HcclComm comm, int64_t ranks, int64_t rank, bool dies)
{
    char name[COMM_NAME_MAX_LENGTH];
    uint32_t size = 0, number = 0;
    NEED(HcclGetCommName(comm, name));
    NEED(HcclGetRankSize(comm, &size));
    NEED(HcclGetRankId(comm, &number));
    need(size == ranks && number == rank, "size and rank of the group");
    aclrtStream stream = nullptr;
    NEED(aclrtCreateStream(&stream));
    NEED(HcclBarrier(comm, stream));
    NEED(aclrtSynchronizeStreamWithTimeout(stream, kHangMs));
    if (dies) {
        (void)raise(SIGKILL);
    }
    std::vector<int32_t> ids;
    for (int64_t i = 0; i < kTokens * ranks; i++) {
        ids.push_back(static_cast<int32_t>(i % ranks));
    }
    const int64_t rows = ranks * kTokens;
    Chain c;
    const uint16_t one_plus[3] = {0x3F80, 0x4000, 0x4040};  // 1, 2, 3 in bf16
    c.x = tensor_of<uint16_t>(
        {kTokens, kHidden}, ACL_BF16, std::vector<uint16_t>(kTokens * kHidden, one_plus[rank % 3]));
    c.ids = tensor_of<int32_t>({kTokens, ranks}, ACL_INT32, ids);
    void *received = device_bytes(static_cast<size_t>(rows * kHidden) * 2);
    c.expand_x = over(received, {rows, kHidden}, ACL_BF16);
    uint64_t bytes = 0;
    aclOpExecutor *executor = nullptr;
    NEED(aclnnMoeDistributeDispatchV2GetWorkspaceSize(
        c.x, c.ids, nullptr, nullptr, nullptr, name, ranks, rank, ranks, "", 0, 0, 0, 0, 0, 0, 0, 1, nullptr,
        c.expand_x, tensor({rows}, ACL_FLOAT), tensor({128 * rows}, ACL_INT32), c.nums, tensor({ranks}, ACL_INT32),
        c.tp_counts, tensor({rows}, ACL_FLOAT), &bytes, &executor));
    NEED(aclnnMoeDistributeDispatchV2(device_bytes(bytes), bytes, executor, stream));
    const int status = aclrtSynchronizeStreamWithTimeout(stream, kHangMs);
    const char *message = status == 0 ? nullptr : aclGetRecentErrMsg();
    std::vector<uint16_t> values(static_cast<size_t>(rows * kHidden));
    NEED(aclrtMemcpy(values.data(), values.size() * 2, received, values.size() * 2, ACL_MEMCPY_DEVICE_TO_HOST));
    int wrong = 0;
    for (size_t i = 0; i < values.size(); i++) {
        const int64_t source = static_cast<int64_t>(i) / (kTokens * kHidden);
        wrong += values[i] != one_plus[source % 3];
    }
    std::printf("rank %d\t%d\t%s\n", static_cast<int>(rank), status,
                message != nullptr ? message : wrong == 0 ? "right" : "wrong values");
    std::fflush(stdout);
    NEED(HcclCommDestroy(comm));
}

int one_rank(const std::string &way, int ranks, int rank, const std::string &what, int from_root, int to_others)
{
    const bool last = rank == ranks - 1;
    if (last && what == "late") {
        usleep(700000);
    }
    NEED(aclInit(nullptr));
    NEED(aclrtSetDevice(rank));
    HcclComm comm = nullptr;
    int status = 0;
    if (way == "root") {
        HcclRootInfo info;
        if (rank == 0) {
            NEED(HcclGetRootInfo(&info));
            for (int other = 1; other < ranks; other++) {
                need(write(to_others, &info, sizeof(info)) == sizeof(info), "write to the pipe");
            }
        } else {
            size_t have = 0;
            while (have < sizeof(info)) {
                const ssize_t some = read(from_root, info.internal + have, sizeof(info) - have);
                need(some > 0, "read from the pipe");
                have += static_cast<size_t>(some);
            }
        }
        status = HcclCommInitRootInfo(static_cast<uint32_t>(ranks), &info, static_cast<uint32_t>(rank), &comm);
    } else {
        HcclCommConfig config;
        HcclCommConfigInit(&config);
        std::strncpy(config.hcclCommName, "of the table", COMM_NAME_MAX_LENGTH - 1);
        status = HcclCommInitClusterInfoConfig(way.c_str(), static_cast<uint32_t>(rank), &config, &comm);
    }
    if (status != 0) {
        std::printf("rank %d joins\t%d\t%s\n", rank, status, aclGetRecentErrMsg());
        std::fflush(stdout);
        _exit(0);
    }
    chain(comm, ranks, rank, last && what == "dies");
    NEED(aclFinalize());
    return 0;
}

}  // namespace

int main(int, char **argv)
{
    const std::string way = argv[1], what = argv[3];
    const int ranks = std::atoi(argv[2]);
    int ends[2];
    need(pipe(ends) == 0, "pipe");
    std::vector<pid_t> children;
    for (int rank = 0; rank < ranks; rank++) {
        const pid_t child = fork();
        if (child == 0) {
            return one_rank(way, ranks, rank, what, ends[0], ends[1]);
        }
        children.push_back(child);
    }
    for (pid_t child : children) {
        int how = 0;
        waitpid(child, &how, 0);
        need(WIFEXITED(how) ? WEXITSTATUS(how) == 0 : what == "dies", "the exit of a rank");
    }
    return 0;
}
