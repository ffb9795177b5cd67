// Embeds the Python that built this library; every call of the five libraries ends here.
#include <Python.h>  // first, as its documentation asks

#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <mutex>
#include <unistd.h>

#include "core.h"
#include "python_home.h"  // written by the builder: which Python, its paths, and what the bridge must answer

namespace evenmoe {
namespace {

constexpr size_t kLongestText = 4096;  // group names end at 127; a string without an end must not be read for ever

thread_local std::string recent_message;
thread_local std::string taken_message;
thread_local bool has_message = false;
PyObject *bridge = nullptr;

class Gil {
public:
    Gil() : state_(PyGILState_Ensure()) {}
    ~Gil() { PyGILState_Release(state_); }
    Gil(const Gil &) = delete;
    Gil &operator=(const Gil &) = delete;

private:
    PyGILState_STATE state_;
};

std::string exception_text()
{
    PyObject *type = nullptr, *value = nullptr, *trace = nullptr;
    PyErr_Fetch(&type, &value, &trace);
    std::string text = "unknown error";
    PyObject *described = value == nullptr ? nullptr : PyObject_Str(value);
    const char *characters = described == nullptr ? nullptr : PyUnicode_AsUTF8(described);
    if (characters != nullptr) {
        text = characters;
    }
    PyErr_Clear();
    Py_XDECREF(described);
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(trace);
    return text;
}

// Returns why there is no interpreter, or nothing.
std::string initialize_python()
{
    // Extension modules look for Python's symbols globally, also when these libraries were opened with RTLD_LOCAL.
    dlopen(kLibpython, RTLD_NOW | RTLD_GLOBAL | RTLD_NOLOAD);
    PyPreConfig before;
    PyPreConfig_InitIsolatedConfig(&before);
    before.utf8_mode = 1;
    PyStatus status = Py_PreInitialize(&before);
    if (PyStatus_Exception(status)) {
        return status.err_msg == nullptr ? "Py_PreInitialize failed" : status.err_msg;
    }
    // Isolated: no environment variable, no user site and no signal handler of Python's changes the C program.
    PyConfig config;
    PyConfig_InitIsolatedConfig(&config);
    status = PyConfig_SetBytesString(&config, &config.program_name, kPython);  // its pyvenv.cfg gives the packages
    if (!PyStatus_Exception(status)) {
        status = PyConfig_SetBytesString(&config, &config.executable, kPython);
    }
    if (!PyStatus_Exception(status)) {
        status = Py_InitializeFromConfig(&config);
    }
    PyConfig_Clear(&config);
    if (PyStatus_Exception(status)) {
        return status.err_msg == nullptr ? "Py_InitializeFromConfig failed" : status.err_msg;
    }
    PyEval_SaveThread();
    return "";
}

std::string import_bridge()
{
    PyObject *path = PySys_GetObject("path");  // borrowed
    Py_ssize_t place = 0;  // before site packages, which may hold another evenmoe than the one that wrote the tree
    for (const char *directory : kPaths) {
        PyObject *entry = PyUnicode_DecodeFSDefault(directory);
        if (path == nullptr || entry == nullptr) {
            return "sys.path cannot be set";
        }
        if (PySequence_Contains(path, entry) == 0) {
            PyList_Insert(path, place++, entry);
        }
        Py_DECREF(entry);
    }
    bridge = PyImport_ImportModule("evenmoe.ascend.cann.bridge");
    if (bridge == nullptr) {
        return exception_text();
    }
    PyObject *answer = PyObject_CallMethod(bridge, "digest", nullptr);
    const char *digest = answer == nullptr ? nullptr : PyUnicode_AsUTF8(answer);
    if (digest == nullptr) {
        return exception_text();
    }
    const bool same = std::strcmp(digest, kDigest) == 0;
    Py_DECREF(answer);
    if (!same) {
        return "the tree was written by another version of evenmoe; write it again with `evenmoe cann`";
    }
    answer = PyObject_CallMethod(bridge, "use_limits", "s", kLimits);
    if (answer == nullptr) {
        return exception_text();
    }
    Py_DECREF(answer);
    return "";
}

void stop_at_exit()
{
    // Streams end before the destructors of torch's libraries run under them.
    if (Py_IsInitialized()) {
        ask("shutdown", {});  // which does nothing in a forked child
    }
}

std::string start()
{
    const bool ours = !Py_IsInitialized();
    if (ours) {
        const std::string why = initialize_python();
        if (!why.empty()) {
            return why;
        }
    }
    Gil gil;
    const std::string why = import_bridge();
    if (why.empty() && ours) {
        PyObject *done = PyObject_CallMethod(bridge, "own_process", nullptr);
        if (done == nullptr) {
            return exception_text();
        }
        Py_DECREF(done);
        std::atexit(stop_at_exit);
    }
    return why;
}

const std::string &why_not_started()
{
    static std::once_flag once;
    static std::string why;
    std::call_once(once, [] { why = start(); });
    return why;
}

PyObject *list_of(const int64_t *items, uint64_t count)
{
    PyObject *list = PyList_New(static_cast<Py_ssize_t>(count));
    for (uint64_t i = 0; list != nullptr && i < count; i++) {
        PyObject *item = PyLong_FromLongLong(items[i]);
        if (item == nullptr) {
            Py_CLEAR(list);
            return nullptr;
        }
        PyList_SET_ITEM(list, static_cast<Py_ssize_t>(i), item);
    }
    return list;
}

PyObject *to_python(const Value &value)
{
    switch (value.kind) {
        case Value::Kind::kSigned:
            return PyLong_FromLongLong(value.integer);
        case Value::Kind::kUnsigned:
            return PyLong_FromUnsignedLongLong(value.word);
        case Value::Kind::kReal:
            return PyFloat_FromDouble(value.real);
        case Value::Kind::kText:
            if (value.text == nullptr) {
                Py_RETURN_NONE;
            }
            return PyUnicode_DecodeUTF8(
                value.text, static_cast<Py_ssize_t>(strnlen(value.text, kLongestText)), "replace");
        case Value::Kind::kList:
            if (value.list == nullptr) {
                Py_RETURN_NONE;
            }
            return list_of(value.list, value.length);
    }
    Py_RETURN_NONE;
}

// (status, message or None, results) -> Reply
Reply to_reply(PyObject *answer)
{
    Reply reply;
    PyObject *results = nullptr;
    const char *message = nullptr;
    if (!PyArg_ParseTuple(answer, "izO", &reply.status, &message, &results)) {
        reply.status = fail(ACL_ERROR_INTERNAL_ERROR, exception_text());
        return reply;
    }
    if (reply.status != 0) {
        fail(reply.status, message == nullptr ? "" : message);
        return reply;
    }
    for (Py_ssize_t i = 0; i < PySequence_Size(results); i++) {
        PyObject *item = PySequence_GetItem(results, i);
        if (PyUnicode_Check(item)) {
            reply.text = PyUnicode_AsUTF8(item);
        } else {
            reply.numbers.push_back(PyLong_AsUnsignedLongLong(item));
        }
        Py_DECREF(item);
    }
    return reply;
}

}  // namespace

Reply ask(const char *function, const std::vector<Value> &arguments)
{
    Reply failed;
    static const pid_t starter = getpid();
    if (getpid() != starter) {  // none of Python's threads is here, and locks may be held for ever
        failed.status = fail(ACL_ERROR_INTERNAL_ERROR,
                             "this process was forked after the first call; fork before it, or start a program anew");
        return failed;
    }
    const std::string &why = why_not_started();
    if (!why.empty()) {
        failed.status = fail(
            ACL_ERROR_INTERNAL_ERROR, std::string("evenmoe does not start in Python ") + kPython + ": " + why);
        return failed;
    }
    Gil gil;
    PyObject *callee = PyObject_GetAttrString(bridge, function);
    PyObject *tuple = PyTuple_New(static_cast<Py_ssize_t>(arguments.size()));
    Py_ssize_t place = 0;
    bool complete = callee != nullptr && tuple != nullptr;
    for (const Value &value : arguments) {
        PyObject *item = complete ? to_python(value) : nullptr;
        complete = complete && item != nullptr;
        if (complete) {
            PyTuple_SET_ITEM(tuple, place++, item);
        }
    }
    PyObject *answer = complete ? PyObject_CallObject(callee, tuple) : nullptr;
    Reply reply = failed;
    if (answer == nullptr) {
        reply.status = fail(ACL_ERROR_INTERNAL_ERROR, exception_text());
    } else {
        reply = to_reply(answer);
    }
    Py_XDECREF(answer);
    Py_XDECREF(tuple);
    Py_XDECREF(callee);
    return reply;
}

int fail(int status, const std::string &message)
{
    recent_message = message;
    has_message = true;
    return status;
}

const char *take_message()
{
    if (!has_message) {
        return nullptr;
    }
    has_message = false;
    taken_message.swap(recent_message);
    return taken_message.c_str();
}

uint64_t &current_context()
{
    thread_local uint64_t context = 0;
    return context;
}

aclnnStatus stage_one(const char *operation, const std::vector<Value> &arguments, uint64_t *workspaceSize,
                      aclOpExecutor **executor)
{
    std::vector<Value> all{Value(operation), Value(workspaceSize), Value(executor)};
    all.insert(all.end(), arguments.begin(), arguments.end());
    const Reply reply = ask("stage_one", all);
    if (reply.status == 0) {
        *workspaceSize = reply.numbers[0];
        *executor = reinterpret_cast<aclOpExecutor *>(reply.numbers[1]);
    }
    return reply.status;
}

aclnnStatus stage_two(const char *operation, void *workspace, uint64_t workspaceSize, aclOpExecutor *executor,
                      aclrtStream stream)
{
    return ask("stage_two", {operation, workspace, workspaceSize, executor, stream, current_context()}).status;
}

}  // namespace evenmoe
