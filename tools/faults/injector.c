/* Count the file system calls of a process, and make one of them the last, fail, or fall short.
 *
 * How a call is caught. A seccomp filter (faults_install) makes the kernel refuse each call of the table below and
 * send SIGSYS to the thread that made it. The handler finds the call's number and arguments in the interrupted
 * registers, does what the plan says, makes the call itself where it is to be made, and puts the result where the
 * caller expects it. So nothing escapes the count: calls that libc makes for itself (opendir, readdir), those made by
 * number (openat2), those of every thread. A library that replaces functions of libc would miss the first and the
 * second. io_uring, which reads and writes without a call for each file, does not exist for the process (ENOSYS); a
 * page fault on a mapped file is no call.
 *
 * How the handler's own calls get through. The filter allows what comes from one instruction, the one in pass().
 *
 * The filter stays until the process ends; `armed` switches counting on and off. Install it in a child.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <ucontext.h>
#include <unistd.h>

#ifndef SYS_openat2 /* younger than the headers of some systems; the same numbers on every architecture */
#define SYS_openat2 437
#endif
#ifndef SYS_faccessat2
#define SYS_faccessat2 439
#endif
#ifndef SYS_io_uring_setup
#define SYS_io_uring_setup 425
#endif

/* Shared with the parent, which reads what happened even if the child was killed. injector.py has the same fields. */
enum { COUNT, KILL, FAIL, SHORT, TORN, INTERRUPT };
enum { LOGGED = 4096, WHERE = 256, SYNCED = 512 };

struct plan {
    int64_t at;             /* the call to meet, from 1; 0: none */
    int32_t action;         /* one of COUNT … INTERRUPT */
    int32_t error;          /* what FAIL puts into errno */
    int32_t armed;          /* whether calls are counted now */
    int32_t hit;            /* whether the fault took place; SHORT and TORN need a call that moves two bytes or more */
    int64_t count;          /* calls made so far */
    int16_t calls[LOGGED];  /* which ones: places in the table */
    char where[WHERE];      /* the file of the call that was met */
    int64_t syncs;          /* files and folders that were synced */
    int64_t synced[SYNCED]; /* their inodes */
};

/* How a call names its file, and which argument is the length of what it moves; VECTOR: arguments 1 and 2 are iovecs. */
enum { FD, PATH, BELOW };
enum { WHOLE = 0, VECTOR = -1 };

struct call {
    int number;
    const char *name;
    int file, length;
};

#define CALL(name, file, length) {SYS_##name, #name, file, length}
static const struct call table[] = {
    CALL(openat, BELOW, WHOLE), CALL(openat2, BELOW, WHOLE), CALL(close, FD, WHOLE),
    CALL(read, FD, 2), CALL(pread64, FD, 2), CALL(readv, FD, VECTOR), CALL(preadv, FD, VECTOR),
    CALL(preadv2, FD, VECTOR), CALL(getdents64, FD, WHOLE), CALL(lseek, FD, WHOLE), CALL(fadvise64, FD, WHOLE),
    CALL(write, FD, 2), CALL(pwrite64, FD, 2), CALL(writev, FD, VECTOR), CALL(pwritev, FD, VECTOR),
    CALL(pwritev2, FD, VECTOR), CALL(copy_file_range, FD, 4), CALL(sendfile, FD, 3), CALL(splice, FD, 4),
    CALL(fallocate, FD, WHOLE), CALL(truncate, PATH, WHOLE), CALL(ftruncate, FD, WHOLE),
    CALL(fsync, FD, WHOLE), CALL(fdatasync, FD, WHOLE), CALL(syncfs, FD, WHOLE), CALL(sync_file_range, FD, WHOLE),
    CALL(mkdirat, BELOW, WHOLE), CALL(mknodat, BELOW, WHOLE), CALL(linkat, BELOW, WHOLE), CALL(symlinkat, PATH, WHOLE),
    CALL(unlinkat, BELOW, WHOLE), CALL(renameat2, BELOW, WHOLE), CALL(readlinkat, BELOW, WHOLE),
    CALL(fstat, FD, WHOLE), CALL(newfstatat, BELOW, WHOLE), CALL(statx, BELOW, WHOLE), CALL(statfs, PATH, WHOLE),
    CALL(fstatfs, FD, WHOLE), CALL(faccessat, BELOW, WHOLE), CALL(faccessat2, BELOW, WHOLE),
    CALL(fchmod, FD, WHOLE), CALL(fchmodat, BELOW, WHOLE), CALL(fchown, FD, WHOLE), CALL(fchownat, BELOW, WHOLE),
    CALL(utimensat, BELOW, WHOLE), CALL(chdir, PATH, WHOLE), CALL(fchdir, FD, WHOLE),
    CALL(fcntl, FD, WHOLE), CALL(ioctl, FD, WHOLE), CALL(flock, FD, WHOLE),
    CALL(getxattr, PATH, WHOLE), CALL(fgetxattr, FD, WHOLE), CALL(listxattr, PATH, WHOLE), CALL(flistxattr, FD, WHOLE),
    CALL(setxattr, PATH, WHOLE), CALL(fsetxattr, FD, WHOLE),
#ifdef SYS_renameat
    CALL(renameat, BELOW, WHOLE),
#endif
#ifdef SYS_open /* what newer architectures leave out */
    CALL(open, PATH, WHOLE), CALL(creat, PATH, WHOLE), CALL(mkdir, PATH, WHOLE), CALL(rmdir, PATH, WHOLE),
    CALL(link, PATH, WHOLE), CALL(symlink, PATH, WHOLE), CALL(unlink, PATH, WHOLE), CALL(rename, PATH, WHOLE),
    CALL(readlink, PATH, WHOLE), CALL(stat, PATH, WHOLE), CALL(lstat, PATH, WHOLE), CALL(access, PATH, WHOLE),
    CALL(chmod, PATH, WHOLE), CALL(chown, PATH, WHOLE), CALL(lchown, PATH, WHOLE), CALL(getdents, FD, WHOLE),
#endif
};
enum { CALLS = sizeof table / sizeof *table };
_Static_assert(CALLS < 240, "a jump of the filter goes over 255 instructions at most");

/* The one instruction that the filter lets through: `passed` is the address after it, which is what the filter sees. */
long pass(long number, long a, long b, long c, long d, long e, long f) __attribute__((visibility("hidden")));
extern const char passed[] __attribute__((visibility("hidden")));

#if defined(__x86_64__)
#define ARCHITECTURE AUDIT_ARCH_X86_64
static const int registers[] = {REG_RDI, REG_RSI, REG_RDX, REG_R10, REG_R8, REG_R9};
#define ARGUMENT(context, i) (context)->uc_mcontext.gregs[registers[i]]
#define RESULT(context) (context)->uc_mcontext.gregs[REG_RAX]
__asm__(".pushsection .text\n.type pass, @function\n.hidden passed\n.globl pass, passed\n"
        "pass: mov %rdi, %rax\n mov %rsi, %rdi\n mov %rdx, %rsi\n mov %rcx, %rdx\n"
        "mov %r8, %r10\n mov %r9, %r8\n mov 8(%rsp), %r9\n syscall\npassed: ret\n.popsection\n");
#elif defined(__aarch64__)
#define ARCHITECTURE AUDIT_ARCH_AARCH64
#define ARGUMENT(context, i) (context)->uc_mcontext.regs[i]
#define RESULT(context) (context)->uc_mcontext.regs[0]
__asm__(".pushsection .text\n.type pass, %function\n.hidden passed\n.globl pass, passed\n"
        "pass: mov x8, x0\n mov x0, x1\n mov x1, x2\n mov x2, x3\n mov x3, x4\n mov x4, x5\n mov x5, x6\n"
        "svc #0\npassed: ret\n.popsection\n");
#else
#error "the injector knows the registers of x86-64 and arm64 only"
#endif

static struct plan *plan;

static long make(const struct call *call, const long *a) {
    return pass(call->number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

static void note_sync(const struct call *call, const long *a, long result) {
    struct stat status;
    if (result == 0 && (call->number == SYS_fsync || call->number == SYS_fdatasync) &&
        pass(SYS_fstat, a[0], (long)&status, 0, 0, 0, 0) == 0) {
        int64_t place = __atomic_fetch_add(&plan->syncs, 1, __ATOMIC_SEQ_CST);
        if (place < SYNCED)
            plan->synced[place] = status.st_ino;
    }
}

static void note_file(const struct call *call, const long *a) {
    const char *path = call->file == PATH ? (const char *)a[0] : call->file == BELOW ? (const char *)a[1] : "";
    if (path && *path) {
        strncpy(plan->where, path, WHERE - 1);
    } else {
        char link[40];
        snprintf(link, sizeof link, "/proc/self/fd/%d", (int)a[0]);
        pass(SYS_readlinkat, AT_FDCWD, (long)link, (long)plan->where, WHERE - 1, 0, 0);
    }
}

/* Half of a length; whole pages where there are any, as direct I/O needs. */
static size_t half(size_t length) {
    return length / 2 >= 4096 ? length / 2 & ~(size_t)4095 : length / 2;
}

/* Make the call with half of what it is to move; false where it moves nothing that has a half. */
static int make_half(const struct call *call, const long *asked, long *result) {
    long a[6];
    struct iovec piece;
    memcpy(a, asked, sizeof a);
    if (call->length == VECTOR && a[2] > 0) {
        piece = *(const struct iovec *)a[1];
        piece.iov_len = half(piece.iov_len);
        a[1] = (long)&piece;
        a[2] = piece.iov_len > 0;
    } else if (call->length > 0) {
        a[call->length] = half(a[call->length]);
    }
    if (call->length == WHOLE || a[call->length == VECTOR ? 2 : call->length] == 0)
        return 0;
    *result = make(call, a);
    return 1;
}

static long inject(const struct call *call, const long *a) {
    long result = 0;
    note_file(call, a);
    switch (plan->action) {
    case KILL:
        plan->hit = 1;
        return kill(getpid(), SIGKILL);
    case FAIL:
        plan->hit = 1;
        if (call->number == SYS_close) /* Linux gives the descriptor up, whatever close returns */
            make(call, a);
        return -plan->error;
    case SHORT:
    case TORN:
        plan->hit = make_half(call, a, &result);
        if (plan->hit && plan->action == TORN)
            kill(getpid(), SIGKILL);
        return plan->hit ? result : make(call, a);
    case INTERRUPT:
        plan->hit = 1;
        kill(getpid(), SIGINT);
    }
    return make(call, a);
}

static void on_call(int signal, siginfo_t *info, void *interrupted) {
    (void)signal;
    ucontext_t *context = interrupted;
    const struct call *call = table;
    long a[6];
    while (call->number != info->si_syscall)
        call++;
    for (int i = 0; i < 6; i++)
        a[i] = ARGUMENT(context, i);
    if (plan->armed) {
        int64_t number = __atomic_add_fetch(&plan->count, 1, __ATOMIC_SEQ_CST);
        if (number <= LOGGED)
            plan->calls[number - 1] = call - table;
        RESULT(context) = number == plan->at ? inject(call, a) : make(call, a);
        note_sync(call, a, RESULT(context));
    } else {
        RESULT(context) = make(call, a);
    }
}

#define LOAD(field, offset) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field) + (offset))
#define JUMP(value, then, otherwise) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value, then, otherwise)
#define RETURN(action) BPF_STMT(BPF_RET | BPF_K, action)

/* Catch this process's calls from now on, by this plan; return 0, or -1 with errno. */
int faults_install(struct plan *shared) {
    enum { FIRST = 5, ALLOW = FIRST + CALLS, ORIGIN, TRAP = ORIGIN + 5, NO_RING, LENGTH };
    const uint64_t origin = (uint64_t)passed;
    struct sock_filter filter[LENGTH] = {
        LOAD(arch, 0), JUMP(ARCHITECTURE, 1, 0), RETURN(SECCOMP_RET_ALLOW),
        LOAD(nr, 0), JUMP(SYS_io_uring_setup, NO_RING - FIRST, 0),
        [ALLOW] = RETURN(SECCOMP_RET_ALLOW),
        [ORIGIN] = LOAD(instruction_pointer, 0), JUMP((uint32_t)origin, 0, 3),
        LOAD(instruction_pointer, 4), JUMP((uint32_t)(origin >> 32), 0, 1), RETURN(SECCOMP_RET_ALLOW),
        [TRAP] = RETURN(SECCOMP_RET_TRAP),
        [NO_RING] = RETURN(SECCOMP_RET_ERRNO | ENOSYS),
    };
    for (int i = 0; i < CALLS; i++)
        filter[FIRST + i] = (struct sock_filter)JUMP(table[i].number, ORIGIN - (FIRST + i) - 1, 0);
    struct sock_fprog program = {LENGTH, filter};
    /* NODEFER: a handler that runs within ours makes calls, too, and a blocked SIGSYS would kill. */
    struct sigaction action = {.sa_sigaction = on_call, .sa_flags = SA_SIGINFO | SA_NODEFER};
    plan = shared;
    if (sigaction(SIGSYS, &action, NULL) || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        return -1;
    return prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program);
}

/* The name of a place in the table, NULL after the last. */
const char *faults_name(int place) {
    return place < CALLS ? table[place].name : NULL;
}
