/* A libnvidia-ml.so.1 that answers as the machine named by NVML_STUB_CASE would.
 *
 * It has the entry points that nvidia-ml-py looks up for detection; any other is missing, as on an old driver.
 * Structures and return codes are those of NVIDIA's nvml.h.
 *
 *   cc -shared -fPIC -o libnvidia-ml.so.1 nvml_stub.c
 */
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MIB(n) ((unsigned long long)(n) << 20)
#define NOT_AVAILABLE (~0ULL)
#define MOST 4

enum {
    SUCCESS = 0,
    INVALID_ARGUMENT = 2,
    NOT_SUPPORTED = 3,
    NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7,
    DRIVER_NOT_LOADED = 9,
    FUNCTION_NOT_FOUND = 13,
    GPU_IS_LOST = 15,
    LIBRARY_MISMATCH = 18,
    UNKNOWN = 999,
};

/* Which queries a device leaves unanswered. */
enum {
    NO_MEMORY = 1,    /* no figures: GB10, Jetson */
    NO_RESERVED = 2,  /* an old driver: version 1 of memory and version 2 of processes only */
    NO_FACTS = 4,     /* nothing but its memory */
    LOST = 8,         /* no handle */
    ZERO_MEMORY = 16, /* a total of zero */
    MEMORY_FAILS = 32,
};

typedef struct {
    unsigned pid;
    const char *name;
    unsigned long long used;
    int compute, graphics;
} Process;

typedef struct Device {
    const char *name, *uuid;
    unsigned total_mib, reserved_mib, free_mib;
    int major, minor;
    int display, unanswered;
    int mig; /* 1: in MIG mode; the slices are below */
    unsigned compute_slices;
    const struct Device *slices[7];
    Process processes[MOST];
} Device;

typedef struct {
    const char *name;
    int init;
    unsigned count;
    const Device *devices[2];
} Case;

static const Device T4 = {
    .name = "Tesla T4", .uuid = "GPU-00000000-0000-0000-0000-0000000000t4",
    .total_mib = 15360, .reserved_mib = 451, .free_mib = 14909, .major = 7, .minor = 5,
};
static const Device A100_BUSY = {
    .name = "NVIDIA A100-SXM4-40GB", .uuid = "GPU-aaaaaaaa-0000-0000-0000-000000000000",
    .total_mib = 40960, .reserved_mib = 635, .free_mib = 9605, .major = 8, .minor = 0,
    .processes = {{4194401, "/opt/venv/bin/python3 --api-key=secret", MIB(30720), 1, 0}},
};
static const Device A100_FREE = {
    .name = "NVIDIA A100-SXM4-40GB", .uuid = "GPU-bbbbbbbb-1111-1111-1111-111111111111",
    .total_mib = 40960, .reserved_mib = 635, .free_mib = 40325, .major = 8, .minor = 0,
};
static const Device A100_LOST = {.unanswered = LOST};
static const Device SLICE_1G = {
    .name = "NVIDIA A100-SXM4-40GB MIG 1g.5gb", .uuid = "MIG-11111111-1111-5111-8111-111111111111",
    .total_mib = 4864, .reserved_mib = 13, .free_mib = 4851, .major = 8, .minor = 0, .compute_slices = 1,
};
static const Device SLICE_3G = {
    .name = "NVIDIA A100-SXM4-40GB MIG 3g.20gb", .uuid = "MIG-33333333-3333-5333-8333-333333333333",
    .total_mib = 19968, .reserved_mib = 37, .free_mib = 17883, .major = 8, .minor = 0, .compute_slices = 3,
    .processes = {{4194402, "python3", MIB(2048), 1, 0}},
};
/* Slots need not be filled from the first on. */
static const Device A100_MIG = {
    .name = "NVIDIA A100-SXM4-40GB", .uuid = "GPU-cccccccc-0000-0000-0000-000000000000",
    .total_mib = 40960, .reserved_mib = 635, .free_mib = 38277, .major = 8, .minor = 0,
    .mig = 1, .slices = {NULL, &SLICE_1G, NULL, &SLICE_3G},
};
static const Device A100_MIG_EMPTY = {
    .name = "NVIDIA A100-SXM4-40GB", .uuid = "GPU-cccccccc-0000-0000-0000-000000000000",
    .total_mib = 40960, .reserved_mib = 635, .free_mib = 40325, .major = 8, .minor = 0, .mig = 1,
};
/* What someone sees who was given a slice of a card and nothing else of it. */
static const Device A30_SLICE_ONLY = {
    .name = "NVIDIA A30", .uuid = "GPU-77777777-0000-0000-0000-000000000000",
    .major = 8, .minor = 0, .unanswered = MEMORY_FAILS, .mig = 1, .slices = {&SLICE_1G},
};
static const Device A30_WITHOUT_FIGURES = {
    .name = "NVIDIA A30", .uuid = "GPU-77777777-0000-0000-0000-000000000000",
    .major = 8, .minor = 0, .unanswered = NO_MEMORY, .mig = 1, .slices = {&SLICE_1G},
};
static const Device GB10 = {
    .name = "NVIDIA GB10", .uuid = "GPU-dddddddd-0000-0000-0000-000000000000",
    .major = 12, .minor = 1, .unanswered = NO_MEMORY,
};
static const Device GB10_ZERO = {
    .name = "NVIDIA GB10", .uuid = "GPU-dddddddd-0000-0000-0000-000000000000",
    .major = 12, .minor = 1, .unanswered = ZERO_MEMORY,
};
static const Device RTX_4090_BUSY = {
    .name = "NVIDIA GeForce RTX 4090", .uuid = "GPU-eeeeeeee-0000-0000-0000-000000000000",
    .total_mib = 24564, .reserved_mib = 480, .free_mib = 14392, .major = 8, .minor = 9, .display = 1,
    .processes = {
        {4194403, "/usr/lib/xorg/Xorg", MIB(412), 0, 1},
        {4194404, "C:\\Program Files\\Comfy\\python.exe", MIB(9216), 1, 1},
        {4194405, NULL, NOT_AVAILABLE, 0, 1},
    },
};
static const Device RTX_4060 = {
    .name = "NVIDIA GeForce RTX 4060", .uuid = "GPU-ffffffff-0000-0000-0000-000000000000",
    .total_mib = 8188, .reserved_mib = 253, .free_mib = 7935, .major = 8, .minor = 9,
};
static const Device T4_OLD_DRIVER = {
    .name = "Tesla T4", .uuid = "GPU-00000000-0000-0000-0000-0000000000t4",
    .total_mib = 15360, .reserved_mib = 451, .free_mib = 13885, .major = 7, .minor = 5, .unanswered = NO_RESERVED,
    .processes = {{4194406, "python3", MIB(1024), 1, 0}},
};
static const Device SILENT = {.total_mib = 10240, .reserved_mib = 240, .free_mib = 9000, .unanswered = NO_FACTS};
static const Device L4_NO_ANSWER = {
    .name = "NVIDIA L4", .uuid = "GPU-99999999-0000-0000-0000-000000000000",
    .major = 8, .minor = 9, .unanswered = MEMORY_FAILS,
};
static const Device UNHEARD_OF = {
    .name = "NVIDIA Prototype \xff", .uuid = "GPU-88888888-0000-0000-0000-000000000000",
    .total_mib = 65536, .free_mib = 65536, .major = 13, .minor = 0,
};

static const Case CASES[] = {
    {"t4", SUCCESS, 1, {&T4}},
    {"rtx_4060", SUCCESS, 1, {&RTX_4060}},
    {"two_a100", SUCCESS, 2, {&A100_BUSY, &A100_FREE}},
    {"unlike_cards", SUCCESS, 2, {&T4, &RTX_4090_BUSY}},
    {"one_lost", SUCCESS, 2, {&A100_LOST, &A100_FREE}},
    {"mig", SUCCESS, 1, {&A100_MIG}},
    {"mig_without_slices", SUCCESS, 1, {&A100_MIG_EMPTY}},
    {"mig_slice_only", SUCCESS, 1, {&A30_SLICE_ONLY}},
    {"mig_card_without_figures", SUCCESS, 1, {&A30_WITHOUT_FIGURES}},
    {"mig_and_t4", SUCCESS, 2, {&A100_MIG, &T4}},
    {"no_memory_figures", SUCCESS, 1, {&GB10}},
    {"zero_memory", SUCCESS, 1, {&GB10_ZERO}},
    {"memory_fails", SUCCESS, 1, {&L4_NO_ANSWER}},
    {"busy_4090", SUCCESS, 1, {&RTX_4090_BUSY}},
    {"old_driver", SUCCESS, 1, {&T4_OLD_DRIVER}},
    {"silent", SUCCESS, 1, {&SILENT}},
    {"unheard_of", SUCCESS, 1, {&UNHEARD_OF}},
    {"no_gpu", SUCCESS, 0, {NULL}},
    {"broken", LIBRARY_MISMATCH, 0, {NULL}},
    {"broken_unknown", UNKNOWN, 0, {NULL}},
    {"not_loaded", DRIVER_NOT_LOADED, 0, {NULL}},
};

static const Case *now; /* what nvmlInit chose */

static const Case *chosen(void) {
    const char *wanted = getenv("NVML_STUB_CASE");
    for (size_t i = 0; wanted && i < sizeof CASES / sizeof *CASES; i++)
        if (!strcmp(CASES[i].name, wanted))
            return &CASES[i];
    fprintf(stderr, "nvml_stub: no case %s\n", wanted ? wanted : "(NVML_STUB_CASE is not set)");
    abort(); /* a misspelt case must not look like a machine without a GPU */
}

static int copied(const char *text, char *out, unsigned length) {
    if (!text)
        return NOT_FOUND;
    if (strlen(text) >= length)
        return INSUFFICIENT_SIZE;
    strcpy(out, text);
    return SUCCESS;
}

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    now = chosen();
    return now->init;
}

int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }

int nvmlShutdown(void) { return SUCCESS; }

const char *nvmlErrorString(int result) {
    switch (result) {
    case SUCCESS: return "The operation was successful";
    case INVALID_ARGUMENT: return "Invalid Argument";
    case NOT_SUPPORTED: return "Not Supported";
    case NOT_FOUND: return "Not Found";
    case INSUFFICIENT_SIZE: return "Insufficient Size";
    case DRIVER_NOT_LOADED: return "Driver Not Loaded";
    case FUNCTION_NOT_FOUND: return "Function Not Found";
    case GPU_IS_LOST: return "GPU is lost";
    case LIBRARY_MISMATCH: return "Driver/library version mismatch";
    default: return "Unknown Error";
    }
}

int nvmlSystemGetDriverVersion(char *out, unsigned length) { return copied("580.82.07", out, length); }

int nvmlSystemGetProcessName(unsigned pid, char *out, unsigned length) {
    for (unsigned i = 0; i < now->count; i++) {
        const Device *card = now->devices[i];
        for (int slot = -1; slot < 7; slot++) {
            const Device *device = slot < 0 ? card : card->slices[slot];
            for (int p = 0; device && p < MOST; p++)
                if (device->processes[p].pid == pid)
                    return copied(device->processes[p].name, out, length);
        }
    }
    return NOT_FOUND;
}

int nvmlDeviceGetCount_v2(unsigned *count) {
    *count = now->count;
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, const Device **device) {
    if (index >= now->count)
        return INVALID_ARGUMENT;
    *device = now->devices[index];
    return (*device)->unanswered & LOST ? GPU_IS_LOST : SUCCESS;
}

int nvmlDeviceGetName(const Device *device, char *out, unsigned length) {
    return device->unanswered & NO_FACTS ? UNKNOWN : copied(device->name, out, length);
}

int nvmlDeviceGetUUID(const Device *device, char *out, unsigned length) {
    return device->unanswered & NO_FACTS ? UNKNOWN : copied(device->uuid, out, length);
}

typedef struct {
    unsigned long long total, free, used;
} Memory;

typedef struct {
    unsigned version;
    unsigned long long total, reserved, free, used;
} MemoryV2;

static int memory_answer(const Device *device) {
    return device->unanswered & NO_MEMORY ? NOT_SUPPORTED : device->unanswered & MEMORY_FAILS ? UNKNOWN : SUCCESS;
}

int nvmlDeviceGetMemoryInfo(const Device *device, Memory *memory) {
    memory->total = MIB(device->total_mib);
    memory->free = MIB(device->free_mib);
    memory->used = memory->total - memory->free; /* version 1 counts what is reserved as used */
    return memory_answer(device);
}

int nvmlDeviceGetMemoryInfo_v2(const Device *device, MemoryV2 *memory) {
    if (device->unanswered & NO_RESERVED)
        return FUNCTION_NOT_FOUND;
    if (memory->version != (sizeof(MemoryV2) | 2u << 24))
        return INVALID_ARGUMENT;
    memory->total = MIB(device->total_mib);
    memory->reserved = MIB(device->reserved_mib);
    memory->free = MIB(device->free_mib);
    memory->used = memory->total - memory->reserved - memory->free;
    return memory_answer(device);
}

int nvmlDeviceGetCudaComputeCapability(const Device *device, int *major, int *minor) {
    *major = device->major;
    *minor = device->minor;
    return device->unanswered & NO_FACTS ? UNKNOWN : SUCCESS;
}

static int display(const Device *device, unsigned *enabled) {
    *enabled = (unsigned)device->display;
    return device->unanswered & NO_FACTS ? NOT_SUPPORTED : SUCCESS;
}

int nvmlDeviceGetDisplayMode(const Device *device, unsigned *enabled) { return display(device, enabled); }

int nvmlDeviceGetDisplayActive(const Device *device, unsigned *enabled) { return display(device, enabled); }

typedef struct {
    unsigned pid;
    unsigned long long used;
    unsigned gpu_instance, compute_instance;
} ProcessInfo;

static int list(const Device *device, int graphics, unsigned *count, ProcessInfo *infos) {
    unsigned found = 0, room = *count;
    if (device->unanswered & NO_FACTS)
        return UNKNOWN;
    for (int p = 0; p < MOST; p++) {
        const Process *process = &device->processes[p];
        if (!(graphics ? process->graphics : process->compute))
            continue;
        if (infos && found < room)
            infos[found] = (ProcessInfo){process->pid, process->used, ~0u, ~0u};
        found++;
    }
    *count = found;
    return found > (infos ? room : 0) ? INSUFFICIENT_SIZE : SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses_v2(const Device *device, unsigned *count, ProcessInfo *infos) {
    return list(device, 0, count, infos);
}

int nvmlDeviceGetComputeRunningProcesses_v3(const Device *device, unsigned *count, ProcessInfo *infos) {
    return device->unanswered & NO_RESERVED ? FUNCTION_NOT_FOUND : list(device, 0, count, infos);
}

int nvmlDeviceGetGraphicsRunningProcesses_v2(const Device *device, unsigned *count, ProcessInfo *infos) {
    return list(device, 1, count, infos);
}

int nvmlDeviceGetGraphicsRunningProcesses_v3(const Device *device, unsigned *count, ProcessInfo *infos) {
    return device->unanswered & NO_RESERVED ? FUNCTION_NOT_FOUND : list(device, 1, count, infos);
}

int nvmlDeviceGetMigMode(const Device *device, unsigned *current, unsigned *pending) {
    *current = *pending = (unsigned)device->mig;
    return device->major >= 8 && !device->compute_slices ? SUCCESS : NOT_SUPPORTED;
}

int nvmlDeviceGetMaxMigDeviceCount(const Device *device, unsigned *count) {
    *count = device->mig ? 7 : 0;
    return SUCCESS;
}

int nvmlDeviceGetMigDeviceHandleByIndex(const Device *device, unsigned index, const Device **slice) {
    if (index >= 7 || !device->slices[index])
        return NOT_FOUND;
    *slice = device->slices[index];
    return SUCCESS;
}

typedef struct {
    unsigned multiprocessors, copy_engines, decoders, encoders, jpegs, ofas, gpu_instance_slices, compute_instance_slices;
    unsigned long long memory_mib;
} Attributes;

int nvmlDeviceGetAttributes_v2(const Device *device, Attributes *attributes) {
    if (!device->compute_slices)
        return NOT_SUPPORTED;
    memset(attributes, 0, sizeof *attributes);
    attributes->multiprocessors = 14 * device->compute_slices;
    attributes->gpu_instance_slices = attributes->compute_instance_slices = device->compute_slices;
    attributes->memory_mib = device->total_mib;
    return SUCCESS;
}
