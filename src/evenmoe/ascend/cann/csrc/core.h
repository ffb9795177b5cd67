// The one way from the C functions into Python: `ask` calls a function of evenmoe.ascend.cann.bridge.
#ifndef EVENMOE_CANN_CORE_H
#define EVENMOE_CANN_CORE_H

#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

#include "aclnn/acl_meta.h"

#define EVENMOE_EXPORT __attribute__((visibility("default")))

namespace evenmoe {

// An argument on its way to Python: a pointer or handle becomes an int that nobody follows, NULL text becomes None.
class Value {
public:
    enum class Kind { kSigned, kUnsigned, kReal, kText, kList };

    template <class T, std::enable_if_t<std::is_integral_v<T> || std::is_enum_v<T>, int> = 0>
    Value(T number) : kind(std::is_signed_v<T> || std::is_enum_v<T> ? Kind::kSigned : Kind::kUnsigned)
    {
        if (kind == Kind::kSigned) {
            integer = static_cast<int64_t>(number);
        } else {
            word = static_cast<uint64_t>(number);
        }
    }
    Value(const void *pointer) : kind(Kind::kUnsigned), word(reinterpret_cast<uintptr_t>(pointer)) {}
    Value(double number) : kind(Kind::kReal), real(number) {}
    Value(const char *characters) : kind(Kind::kText), text(characters) {}
    Value(const int64_t *first, uint64_t count) : kind(Kind::kList), list(first), length(count) {}

    Kind kind;
    int64_t integer = 0;
    uint64_t word = 0;
    double real = 0;
    const char *text = nullptr;
    const int64_t *list = nullptr;
    uint64_t length = 0;
};

// What came back: 0 and the results, or a status; the message then waits for aclGetRecentErrMsg.
struct Reply {
    int status = 0;
    std::vector<uint64_t> numbers;
    std::string text;
};

EVENMOE_EXPORT Reply ask(const char *function, const std::vector<Value> &arguments);

// Keeps the message of a call that failed, and returns its status.
EVENMOE_EXPORT int fail(int status, const std::string &message);

// The calling thread's message, or NULL; taking it clears it.
EVENMOE_EXPORT const char *take_message();

// The calling thread's context: a handle, 0 for none. Here, since Python forgets a foreign thread after every call.
EVENMOE_EXPORT uint64_t &current_context();

EVENMOE_EXPORT aclnnStatus stage_one(const char *operation, const std::vector<Value> &arguments,
                                     uint64_t *workspaceSize, aclOpExecutor **executor);
EVENMOE_EXPORT aclnnStatus stage_two(const char *operation, void *workspace, uint64_t workspaceSize,
                                     aclOpExecutor *executor, aclrtStream stream);

}  // namespace evenmoe

#endif
