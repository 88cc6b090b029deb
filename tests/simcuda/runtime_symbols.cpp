/* runtime_symbols.cpp: names of kernels and places of their static __shared__ variables, from the symbol table of the
 * file that holds them. A static variable of a function is called _ZZ<function>E<name>, and those that are thread-local
 * are the shared ones (include/simcuda/language.h). Without a symbol table nothing is found, and nothing is poisoned.
 */
#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <fcntl.h>
#include <link.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <map>
#include <set>

#include "runtime.h"

namespace simcuda {
namespace {

struct Tls_variable {
  std::string name;
  size_t offset, bytes;
};

struct Module {
  size_t tls_id = 0;
  std::map<uintptr_t, std::string> functions; /* by address */
  std::set<std::string> function_names;
  std::vector<Tls_variable> variables;
};

struct Kernel {
  std::string name;
  std::vector<Tls_variable> shared;
  size_t tls_id = 0;
};

struct Search {
  uintptr_t address;
  uintptr_t base;
  size_t tls_id;
  bool found;
};

int find_module(dl_phdr_info *info, size_t, void *data) {
  Search *search = static_cast<Search *>(data);
  for (int i = 0; i < info->dlpi_phnum; i++) {
    const ElfW(Phdr) &p = info->dlpi_phdr[i];
    uintptr_t start = info->dlpi_addr + p.p_vaddr;
    if (p.p_type != PT_LOAD || search->address < start || search->address >= start + p.p_memsz) continue;
    search->base = info->dlpi_addr;
    search->tls_id = info->dlpi_tls_modid;
    search->found = true;
    return 1;
  }
  return 0;
}

void read_symbols(const char *file, size_t bytes, uintptr_t base, Module *module) {
  ElfW(Ehdr) header;
  if (bytes < sizeof header) return;
  memcpy(&header, file, sizeof header);
  const ElfW(Shdr) *sections = reinterpret_cast<const ElfW(Shdr) *>(file + header.e_shoff);
  if (header.e_shoff + header.e_shnum * sizeof *sections > bytes) return;
  for (int i = 0; i < header.e_shnum; i++) {
    if (sections[i].sh_type != SHT_SYMTAB) continue;
    const ElfW(Sym) *symbols = reinterpret_cast<const ElfW(Sym) *>(file + sections[i].sh_offset);
    const char *names = file + sections[sections[i].sh_link].sh_offset;
    for (size_t s = 0; s < sections[i].sh_size / sizeof *symbols; s++) {
      const char *name = names + symbols[s].st_name;
      int type = symbols[s].st_info & 0xf;
      if (symbols[s].st_shndx == SHN_UNDEF) continue;
      if (type == STT_FUNC) {
        module->functions[base + symbols[s].st_value] = name;
        module->function_names.insert(name);
      } else if (type == STT_TLS && strncmp(name, "_ZZ", 3) == 0) {
        module->variables.push_back({name, symbols[s].st_value, symbols[s].st_size});
      }
    }
  }
}

/* Null if the address lies in no file. */
Module *module_of(const void *address) {
  static std::map<uintptr_t, Module> modules;
  Search search = {reinterpret_cast<uintptr_t>(address), 0, 0, false};
  dl_iterate_phdr(find_module, &search);
  if (!search.found) return nullptr;
  auto known = modules.find(search.base);
  if (known != modules.end()) return &known->second;
  Module &module = modules[search.base];
  module.tls_id = search.tls_id;
  Dl_info info = {};
  dladdr(address, &info);
  /* The program itself may have been called by a relative name. */
  Search self = {reinterpret_cast<uintptr_t>(dlsym(RTLD_DEFAULT, "_start")), 0, 0, false};
  bool is_program = info.dli_fname == nullptr || strchr(info.dli_fname, '/') == nullptr ||
                    access(info.dli_fname, R_OK) != 0 || self.address == search.address;
  int fd = open(is_program ? "/proc/self/exe" : info.dli_fname, O_RDONLY | O_CLOEXEC);
  struct stat st = {};
  if (fd >= 0 && fstat(fd, &st) == 0 && st.st_size > 0) {
    size_t bytes = static_cast<size_t>(st.st_size);
    void *file = mmap(nullptr, bytes, PROT_READ, MAP_PRIVATE, fd, 0);
    if (file != MAP_FAILED) {
      read_symbols(static_cast<const char *>(file), bytes, search.base, &module);
      munmap(file, bytes);
    }
  }
  if (fd >= 0) close(fd);
  return &module;
}

std::string demangled(const std::string &name) {
  int status = 0;
  char *text = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
  std::string result = status == 0 && text ? text : name;
  free(text);
  if (result.compare(0, 5, "void ") == 0) result.erase(0, 5); /* templates carry their result */
  size_t parameters = result.find('(', result.compare(0, 11, "(anonymous ") == 0 ? 1 : 0);
  return result.substr(0, parameters);
}

/* "f" of "f", "3fooIiE..." of "_Z3fooIiE...": how a function stands in the names of its variables. */
std::string encoding(const std::string &function) {
  return function.compare(0, 2, "_Z") == 0 ? function.substr(2) : std::to_string(function.size()) + function;
}

/* The function whose variable this is: the longest one that fits; empty if it was inlined everywhere. */
std::string owner(const Module &module, const std::string &variable) {
  for (size_t end = variable.rfind('E'); end != std::string::npos && end > 3; end = variable.rfind('E', end - 1)) {
    std::string function = "_Z" + variable.substr(3, end - 3);
    if (module.function_names.count(function)) return function;
  }
  return "";
}

const Kernel &kernel_of(const void *address) {
  static std::map<const void *, Kernel> kernels;
  auto known = kernels.find(address);
  if (known != kernels.end()) return known->second;
  Kernel &kernel = kernels[address];
  kernel.name = "?";
  Module *module = module_of(address);
  if (module == nullptr) return kernel;
  auto function = module->functions.find(reinterpret_cast<uintptr_t>(address));
  if (function == module->functions.end()) return kernel;
  kernel.name = demangled(function->second);
  kernel.tls_id = module->tls_id;
  std::string own = "_ZZ" + encoding(function->second) + "E";
  for (const Tls_variable &v : module->variables) {
    /* Those of helpers that were inlined into kernels belong to any of them. */
    if (v.name.compare(0, own.size(), own) == 0 || owner(*module, v.name).empty()) kernel.shared.push_back(v);
  }
  return kernel;
}

struct Tls_index { /* as the ABI has it */
  unsigned long module, offset;
};
extern "C" void *__tls_get_addr(Tls_index *);

} // namespace

const std::string &kernel_name(const void *kernel) {
  return kernel_of(kernel).name;
}

std::vector<Variable> shared_variables(const void *address) {
  const Kernel &kernel = kernel_of(address);
  std::vector<Variable> variables;
  for (const Tls_variable &v : kernel.shared) {
    Tls_index index = {kernel.tls_id, v.offset};
    variables.push_back({__tls_get_addr(&index), v.bytes});
  }
  return variables;
}

} // namespace simcuda
