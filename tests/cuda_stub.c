/* A CUDA runtime library without a GPU: device memory is host memory, a stream does its work at
 * once, an event is the count of what was done before it, a graph is a list of work. At its end
 * are the functions of the driver's library that record graphs.
 *
 * It refuses what CUDA refuses: handles and addresses that are not its own, copies past the end,
 * and waiting for a stream while it is captured. stub_* are for the tests. $CUDA_STUB_FAULT, as
 * in "cudaSetDevice=35", makes every call of a function fail. The GPU is an Orin, or, with
 * $CUDA_STUB_GPU, as in "8.9", a card of that compute capability.
 */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { DEVICE, HOST, MAPPED, STREAM, EVENT, GRAPH, EXEC };
enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, BAD_HANDLE = 400, TIMEOUT = 909 };
enum { CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901, ILLEGAL_STATE = 401 };
#define LARGEST ((size_t)1 << 33)
#define LIVE 65536

typedef void (*Callback)(void *);
typedef struct { void *to; const void *from; size_t size; Callback call; void *data; } Work;
typedef struct { Work *work; size_t count; } Graph;
typedef struct { int capturing, invalid; Graph *graph; } Stream;
typedef struct { uint64_t time; } Event;
typedef struct { int kind; char *pointer; size_t size; } Entry;

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static Entry live[LIVE];
static uint64_t done;
static char fault_name[64];
static int fault_code, held, waiting, copy_ms;
static __thread int last_error;

static const struct { int code; const char *name, *text; } errors[] = {
    {0, "cudaSuccess", "no error"},
    {1, "cudaErrorInvalidValue", "invalid argument"},
    {2, "cudaErrorMemoryAllocation", "out of memory"},
    {35, "cudaErrorInsufficientDriver",
     "CUDA driver version is insufficient for CUDA runtime version"},
    {100, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {214, "cudaErrorECCUncorrectable", "uncorrectable ECC error encountered"},
    {400, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {401, "cudaErrorIllegalState", "the operation cannot be performed in the present state"},
    {700, "cudaErrorIllegalAddress", "an illegal memory access was encountered"},
    {719, "cudaErrorLaunchFailure", "unspecified launch failure"},
    {900, "cudaErrorStreamCaptureUnsupported",
     "operation not permitted when stream is capturing"},
    {901, "cudaErrorStreamCaptureInvalidated",
     "operation failed due to a previous error during capture"},
    {909, "cudaErrorTimeout", "wait operation timed out"},
};
#define ERRORS (sizeof errors / sizeof *errors)

static int known(int code) {
    for (size_t i = 0; i < ERRORS; i++)
        if (errors[i].code == code) return (int)i;
    return 1;
}
const char *cudaGetErrorName(int code) { return errors[known(code)].name; }
const char *cudaGetErrorString(int code) { return errors[known(code)].text; }

static int failed(int code) { return last_error = code; }

int cudaGetLastError(void) {
    int code = last_error;
    last_error = OK;
    return code;
}

/* The code that a function has to fail with now, or 0. */
static int fault(const char *name) {
    const char *always = getenv("CUDA_STUB_FAULT");
    size_t length = strlen(name);
    if (always && !strncmp(always, name, length) && always[length] == '=')
        return failed(atoi(always + length + 1));
    pthread_mutex_lock(&mutex);
    int hit = fault_code && !strcmp(fault_name, name) ? fault_code : 0;
    if (hit) fault_code = 0;
    pthread_mutex_unlock(&mutex);
    return hit ? failed(hit) : 0;
}
#define ENTER() do { int code_ = fault(__func__); if (code_) return code_; } while (0)

void stub_fail(const char *name, int code) {
    snprintf(fault_name, sizeof fault_name, "%s", name);
    fault_code = code;
}

static int add(int kind, void *pointer, size_t size) {
    int code = OUT_OF_MEMORY;
    pthread_mutex_lock(&mutex);
    for (size_t i = 0; pointer && code && i < LIVE; i++)
        if (!live[i].pointer) {
            live[i] = (Entry){kind, pointer, size};
            code = OK;
        }
    pthread_mutex_unlock(&mutex);
    return code ? failed(code) : OK;
}

/* Whether [pointer, pointer + size) lies in something live of that kind (whole: begins it). */
static int has(int kind, const void *pointer, size_t size, int whole, int take) {
    const char *at = pointer;
    int found = 0;
    pthread_mutex_lock(&mutex);
    for (size_t i = 0; at && !found && i < LIVE; i++)
        if (live[i].pointer && live[i].kind == kind && at >= live[i].pointer &&
            at + size <= live[i].pointer + live[i].size && (!whole || at == live[i].pointer)) {
            found = 1;
            if (take) live[i].pointer = NULL;
        }
    pthread_mutex_unlock(&mutex);
    return found;
}
static int is(int kind, const void *handle) { return has(kind, handle, 1, 1, 0); }
static int take(int kind, const void *handle) { return has(kind, handle, 1, 1, 1); }

int stub_live(void) {
    int count = 0;
    pthread_mutex_lock(&mutex);
    for (size_t i = 0; i < LIVE; i++) count += live[i].pointer != NULL;
    pthread_mutex_unlock(&mutex);
    return count;
}

int cudaSetDevice(int device) {
    ENTER();
    return device ? failed(INVALID_VALUE) : OK;
}

int cudaDeviceGetAttribute(int *value, int attribute, int device) {
    ENTER();
    const char *card = getenv("CUDA_STUB_GPU");
    int major = 8, minor = 7;
    if (card) sscanf(card, "%d.%d", &major, &minor);
    *value = attribute == 75 ? major : attribute == 76 ? minor : attribute == 18 ? !card : -1;
    return device ? failed(INVALID_VALUE) : OK;
}

/* CUDA 12 has two layouts, of about these sizes; the name is first in both. */
static void describe(char *properties, const char *name, size_t size) {
    memset(properties, 0x7f, size);
    snprintf(properties, 256, "%s", name);
}
int cudaGetDeviceProperties(char *properties, int device) {
    ENTER();
    describe(properties, "the old layout", 728);
    return device ? failed(INVALID_VALUE) : OK;
}
int cudaGetDeviceProperties_v2(char *properties, int device) {
    ENTER();
    describe(properties, getenv("CUDA_STUB_GPU") ? "Card (stub)" : "Orin (stub)", 1032);
    return device ? failed(INVALID_VALUE) : OK;
}

int cudaMemGetInfo(size_t *free_, size_t *total) {
    ENTER();
    *free_ = LARGEST / 2;
    *total = LARGEST;
    return OK;
}

int cudaMalloc(void **pointer, size_t size) {
    ENTER();
    if (size > LARGEST) return failed(OUT_OF_MEMORY);
    return add(DEVICE, *pointer = malloc(size), size);
}
int cudaFree(void *pointer) {
    ENTER();
    if (pointer && !take(DEVICE, pointer)) return failed(INVALID_VALUE);
    free(pointer);
    return OK;
}

int cudaHostAlloc(void **pointer, size_t size, unsigned flags) {
    ENTER();
    if (size > LARGEST) return failed(OUT_OF_MEMORY);
    return add(flags & 2 ? MAPPED : HOST, *pointer = malloc(size), size);
}
int cudaFreeHost(void *pointer) {
    ENTER();
    if (pointer && !take(HOST, pointer) && !take(MAPPED, pointer)) return failed(INVALID_VALUE);
    free(pointer);
    return OK;
}
int cudaHostGetDevicePointer(void **device, void *pointer, unsigned flags) {
    ENTER();
    *device = pointer;
    return flags || !is(MAPPED, pointer) ? failed(INVALID_VALUE) : OK;
}

static void wait_ms(int ms) { nanosleep(&(struct timespec){0, ms * 1000000L}, NULL); }

/* How long a copy takes from now on, beside its own time. */
void stub_slow_copies(int ms) { copy_ms = ms; }
int stub_is_mapped(const void *pointer) { return is(MAPPED, pointer); }
int stub_is_capturing(const Stream *stream) { return is(STREAM, stream) && stream->capturing; }

static int do_work(Work work) {
    if (work.call) work.call(work.data);
    else {
        if (copy_ms) wait_ms(copy_ms);
        memcpy(work.to, work.from, work.size);
    }
    pthread_mutex_lock(&mutex);
    done++;
    pthread_mutex_unlock(&mutex);
    return OK;
}
static int enqueue(Stream *stream, Work work) {
    if (stream && !is(STREAM, stream)) return failed(BAD_HANDLE);
    if (!stream || !stream->capturing) return do_work(work);
    Graph *graph = stream->graph;
    graph->work = realloc(graph->work, (graph->count + 1) * sizeof(Work));
    graph->work[graph->count++] = work;
    return OK;
}

static int host_has(const void *pointer, size_t size) {
    return has(HOST, pointer, size, 0, 0) || has(MAPPED, pointer, size, 0, 0);
}
int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, Stream *stream) {
    ENTER();
    const void *device = kind == 1 ? to : from, *host = kind == 1 ? from : to;
    if ((kind != 1 && kind != 2) || !has(DEVICE, device, size, 0, 0) || !host_has(host, size))
        return failed(INVALID_VALUE);
    return enqueue(stream, (Work){to, from, size, NULL, NULL});
}
int cudaLaunchHostFunc(Stream *stream, Callback call, void *data) {
    ENTER();
    return enqueue(stream, (Work){NULL, NULL, 0, call, data});
}

int cudaStreamCreateWithFlags(Stream **stream, unsigned flags) {
    ENTER();
    if (flags > 1) return failed(INVALID_VALUE);
    return add(STREAM, *stream = calloc(1, sizeof(Stream)), sizeof(Stream));
}
int cudaStreamDestroy(Stream *stream) {
    ENTER();
    if (!take(STREAM, stream)) return failed(BAD_HANDLE);
    free(stream);
    return OK;
}

/* While held, waiting for a stream lasts until another thread releases it: ten seconds at most. */
void stub_hold(int hold) { __atomic_store_n(&held, hold, __ATOMIC_SEQ_CST); }
int stub_waiting(void) { return __atomic_load_n(&waiting, __ATOMIC_SEQ_CST); }

int cudaStreamSynchronize(Stream *stream) {
    ENTER();
    if (stream && !is(STREAM, stream)) return failed(BAD_HANDLE);
    if (stream && stream->capturing) {
        stream->invalid = 1;
        return failed(CAPTURE_UNSUPPORTED);
    }
    int left = 10000;
    __atomic_store_n(&waiting, 1, __ATOMIC_SEQ_CST);
    while (__atomic_load_n(&held, __ATOMIC_SEQ_CST) && --left)
        wait_ms(1);
    __atomic_store_n(&waiting, 0, __ATOMIC_SEQ_CST);
    return left ? OK : failed(TIMEOUT);
}

int cudaEventCreate(Event **event) {
    ENTER();
    return add(EVENT, *event = calloc(1, sizeof(Event)), sizeof(Event));
}
int cudaEventDestroy(Event *event) {
    ENTER();
    if (!take(EVENT, event)) return failed(BAD_HANDLE);
    free(event);
    return OK;
}
int cudaEventRecord(Event *event, Stream *stream) {
    ENTER();
    if (!is(EVENT, event) || (stream && !is(STREAM, stream))) return failed(BAD_HANDLE);
    event->time = done + 1;
    return OK;
}
int cudaEventSynchronize(Event *event) {
    ENTER();
    return is(EVENT, event) ? OK : failed(BAD_HANDLE);
}
/* One millisecond for each piece of work between. */
int cudaEventElapsedTime(float *ms, Event *start, Event *end) {
    ENTER();
    if (!is(EVENT, start) || !is(EVENT, end) || !start->time || !end->time)
        return failed(BAD_HANDLE);
    *ms = (float)(end->time - start->time);
    return OK;
}

int cudaStreamBeginCapture(Stream *stream, int mode) {
    ENTER();
    if (!is(STREAM, stream)) return failed(BAD_HANDLE);
    if (mode < 0 || mode > 2 || stream->capturing) return failed(ILLEGAL_STATE);
    stream->capturing = 1;
    return add(GRAPH, stream->graph = calloc(1, sizeof(Graph)), sizeof(Graph));
}
int cudaGraphDestroy(Graph *graph) {
    ENTER();
    if (!take(GRAPH, graph)) return failed(INVALID_VALUE);
    free(graph->work);
    free(graph);
    return OK;
}
int cudaStreamEndCapture(Stream *stream, Graph **graph) {
    ENTER();
    if (!is(STREAM, stream)) return failed(BAD_HANDLE);
    if (!stream->capturing) return failed(ILLEGAL_STATE);
    *graph = stream->graph;
    int invalid = stream->invalid;
    *stream = (Stream){0};
    if (!invalid) return OK;
    cudaGraphDestroy(*graph);
    *graph = NULL;
    return failed(CAPTURE_INVALIDATED);
}
int cudaGraphInstantiateWithFlags(Graph **exec, Graph *graph, unsigned long long flags) {
    ENTER();
    if (flags || !is(GRAPH, graph)) return failed(INVALID_VALUE);
    size_t size = graph->count * sizeof(Work);
    *exec = calloc(1, sizeof(Graph));
    **exec = (Graph){malloc(size + 1), graph->count};
    memcpy((*exec)->work, graph->work, size);
    return add(EXEC, *exec, sizeof(Graph));
}
int cudaGraphLaunch(Graph *exec, Stream *stream) {
    ENTER();
    if (!is(EXEC, exec)) return failed(INVALID_VALUE);
    int code = OK;
    for (size_t i = 0; i < exec->count && !code; i++) code = enqueue(stream, exec->work[i]);
    return code;
}
int cudaGraphExecDestroy(Graph *exec) {
    ENTER();
    if (!take(EXEC, exec)) return failed(INVALID_VALUE);
    free(exec->work);
    free(exec);
    return OK;
}

/* The driver's library: the same handles and codes, other names. */
int cuStreamBeginCapture_v2(Stream *stream, int mode) {
    return cudaStreamBeginCapture(stream, mode);
}
int cuStreamEndCapture(Stream *stream, Graph **graph) { return cudaStreamEndCapture(stream, graph); }
int cuGraphInstantiateWithFlags(Graph **exec, Graph *graph, unsigned long long flags) {
    return cudaGraphInstantiateWithFlags(exec, graph, flags);
}
int cuGraphLaunch(Graph *exec, Stream *stream) { return cudaGraphLaunch(exec, stream); }
int cuGraphDestroy(Graph *graph) { return cudaGraphDestroy(graph); }
int cuGraphExecDestroy(Graph *exec) { return cudaGraphExecDestroy(exec); }
int cuGetErrorString(int code, const char **text) {
    *text = cudaGetErrorString(code);
    return OK;
}
int cuGetErrorName(int code, const char **name) {
    *name = code == 900   ? "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"
            : code == 901 ? "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"
                          : "CUDA_ERROR_UNKNOWN";
    return OK;
}
