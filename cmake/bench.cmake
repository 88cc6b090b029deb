# bench/<name>.c: measuring programs, built on request (ninja bench_<name>), linked to every room up to text.
if(TARGET esp_upto_text)
  add_executable(bench_tokenizer EXCLUDE_FROM_ALL bench/tokenizer.c)
  target_link_libraries(bench_tokenizer PRIVATE esp_upto_text)
endif()
if(TARGET esp_upto_backend)
  add_executable(bench_gemm EXCLUDE_FROM_ALL bench/gemm.c)
  target_link_libraries(bench_gemm PRIVATE esp_upto_backend)
endif()
