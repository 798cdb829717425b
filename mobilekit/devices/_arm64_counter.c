/* Counts the instructions that QEMU's user mode carries out: a plugin for it, built where it is used.
 *
 * Argument: counts=FILE, a file of 512 zeros of 64 bits, one for each thread (modulo 512), which is mapped and added to.
 * The declarations are those of qemu-plugin.h, which Debian does not package; libc's header files are not needed either.
 */
typedef unsigned long long u64;
typedef unsigned long size;
struct qemu_plugin_tb;

size qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *block);
void qemu_plugin_register_vcpu_tb_trans_cb(u64 plugin, void (*translated)(u64, struct qemu_plugin_tb *));
void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *block, void (*executed)(unsigned, void *), int flags,
                                          void *data);
int open(const char *path, int flags, ...);
int close(int file);
void *mmap(void *address, size length, int protection, int flags, int file, long offset);

enum { THREADS = 512, READ_WRITE = 2, PROT_READ_WRITE = 3, SHARED = 1, NO_REGISTERS = 0 };

__attribute__((visibility("default"))) int qemu_plugin_version = PLUGIN_VERSION;
static volatile u64 *counts;

static void executed(unsigned cpu, void *instructions) { counts[cpu % THREADS] += (u64)instructions; }

static void translated(u64 plugin, struct qemu_plugin_tb *block) {
    (void)plugin;
    qemu_plugin_register_vcpu_tb_exec_cb(block, executed, NO_REGISTERS, (void *)qemu_plugin_tb_n_insns(block));
}

__attribute__((visibility("default"))) int qemu_plugin_install(u64 plugin, const void *about, int count, char **given) {
    (void)about;
    if (count != 1)
        return 1;
    const char *path = given[0];
    while (*path && *path != '=')
        path++;
    int file = *path ? open(path + 1, READ_WRITE) : -1;
    if (file < 0)
        return 1;
    void *mapped = mmap(0, THREADS * sizeof(u64), PROT_READ_WRITE, SHARED, file, 0);
    close(file);
    if (mapped == (void *)-1)
        return 1;
    counts = mapped;
    qemu_plugin_register_vcpu_tb_trans_cb(plugin, translated);
    return 0;
}
